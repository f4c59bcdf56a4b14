"""The regression gate: did the new checkpoint lose more than its budget? docs/gate.md argues the rule.

For each task, and for all items pooled, the one-sided lower confidence bound of the drop is compared with the budget.
The level alpha (5 %) is shared: half for the pooled items, half in equal parts for the tasks, so that an unchanged
model fails the whole gate with at most that probability, however many tasks there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from holdfast.errors import UserError
from holdfast.evaluate.intervals import Array, ratio_interval, t_value
from holdfast.evaluate.paired import (
    NOISE_FLOOR,
    coin_tail,
    drop_bounds,
    items_needed,
    minimum_detectable_drop,
    score_statistic,
)

ALPHA = 0.05
POWER = 0.8
POOLED = "all items"
Verdict = Literal["ok", "unclear", "fail", "shown"]


@dataclass(frozen=True)
class GateRow:
    """One comparison. Drops and bounds in points (perplexity: rise in percent); ``n`` items, each scored by both.

    ``low``/``high`` are one-sided bounds at level ``alpha``. verdict: fail (low > budget), ok (high <= budget), unclear
    (neither: too few items), shown (not gated). ``smallest``: the least true drop these items show to exceed the budget
    4 times of 5; ``needed``: items with which an unchanged model would be shown to stay within the budget.
    """

    name: str
    metric: str
    n: int
    before: float
    after: float
    drop: float
    low: float
    high: float
    lost: int
    won: int
    alpha: float
    budget: float
    verdict: Verdict
    smallest: float = float("nan")
    needed: int = 0

    @property
    def too_small(self) -> bool:
        """Whether even a model without any change could not be shown to stay within the budget."""
        return self.needed > self.n


@dataclass(frozen=True)
class GateReport:
    """All comparisons of one check; it failed if any of them did."""

    rows: tuple[GateRow, ...]
    max_drop: float
    alpha: float
    skipped: int = 0  # items that one side could not score
    notes: tuple[str, ...] = field(default=())

    @property
    def failed(self) -> bool:
        """Whether some drop is more than its budget, beyond item noise."""
        return any(row.verdict == "fail" for row in self.rows)

    @property
    def unclear(self) -> bool:
        """Whether some drop could be more than its budget, but the items do not tell."""
        return any(row.verdict == "unclear" for row in self.rows)


def compare(
    before: pd.DataFrame,
    after: pd.DataFrame,
    max_drop: float = 1.0,
    *,
    alpha: float = ALPHA,
    max_perplexity_rise: float | None = None,
    tasks: Sequence[str] | None = None,
) -> GateReport:
    """Gate two per-item tables (as `measure` returns) of the same items against a budget in points.

    ``max_drop``: points a task, or all items together, may lose. ``max_perplexity_rise``: percent a perplexity may rise
    (None: shown, not gated). Items that either side could not score are left out and counted.
    Raises UserError if a task or item is missing on one side, or nothing is left to compare.
    """
    if max_drop < 0 or not 0 < alpha < 0.5:
        raise UserError(f"max_drop must be at least 0 and alpha within (0, 0.5), got {max_drop} and {alpha}.")
    paired = _paired(before, after, tasks)
    good = paired[paired["score_before"].notna() & paired["score_after"].notna()]
    if good.empty:
        raise UserError("no item was scored by both sides.")
    accuracy = good[good["metric"] != "perplexity"]
    perplexity = good[good["metric"] == "perplexity"]
    names = list(dict.fromkeys(accuracy["task"]))
    gated = len(names) + (perplexity["task"].nunique() if max_perplexity_rise is not None else 0)
    pooled = len(names) > 1
    share = (alpha / 2 if pooled else alpha) / max(1, gated)
    rows = []
    if pooled:
        rows.append(_drop_row(POOLED, "accuracy", accuracy, max_drop, alpha / 2))
    for name in names:
        part = accuracy[accuracy["task"] == name]
        rows.append(_drop_row(name, str(part["metric"].iloc[0]), part, max_drop, share))
    for name in dict.fromkeys(perplexity["task"]):
        rows.append(_rise_row(name, perplexity[perplexity["task"] == name], max_perplexity_rise, share))
    return GateReport(tuple(rows), max_drop, alpha, skipped=len(paired) - len(good))


def _paired(before: pd.DataFrame, after: pd.DataFrame, tasks: Sequence[str] | None) -> pd.DataFrame:
    keep = ["task", "item", "metric", "score", "weight"]
    for name, table in (("before", before), ("after", after)):
        missing = [column for column in keep if column not in table.columns]
        if missing:
            raise UserError(f"the items {name} have no column '{missing[0]}'; expected those of `holdfast eval`.")
    left, right = before[keep], after[keep]
    if tasks is not None:
        left, right = left[left["task"].isin(tasks)], right[right["task"].isin(tasks)]
    only = set(left["task"]) ^ set(right["task"])
    if only:
        raise UserError(f"task '{min(only)}' was measured on one side only: both sides need the same panel.")
    joined = left.merge(right, on=["task", "item"], how="outer", suffixes=("_before", "_after"), indicator=True)
    lonely = joined[joined["_merge"] != "both"]
    if len(lonely):
        first = lonely.iloc[0]
        raise UserError(
            f"{len(lonely)} items were measured on one side only (first: task '{first['task']}', item "
            f"'{first['item']}'): both sides need the same items."
        )
    if len(joined) != len(left):
        raise UserError("an item id is used more than once within a task: items can't be paired.")
    return joined.rename(columns={"metric_before": "metric"})


def _drop_row(name: str, metric: str, part: pd.DataFrame, budget: float, alpha: float) -> GateRow:
    before, after = part["score_before"].to_numpy(dtype=float), part["score_after"].to_numpy(dtype=float)
    difference, n = before - after, len(part)
    lost, won = int((difference > 0).sum()), int((difference < 0).sum())
    if np.isin(difference, (-1.0, 0.0, 1.0)).all():
        low, high = (100.0 * float(x) for x in drop_bounds(lost, won, n, alpha))
        # The score test is an approximation; the exact test holds the level when nothing changed.
        beyond = low > budget and coin_tail(lost, lost + won) <= alpha
    else:
        low, high = _t_bounds(difference, alpha)
        beyond = low > budget
    discordance = max(float((difference**2).mean()), NOISE_FLOOR)
    smallest = minimum_detectable_drop(n, discordance, alpha=alpha, target=POWER, budget=budget / 100.0)
    return GateRow(
        name=name,
        metric=metric,
        n=n,
        before=100.0 * float(before.mean()),
        after=100.0 * float(after.mean()),
        drop=100.0 * float(difference.mean()),
        low=low,
        high=high,
        lost=lost,
        won=won,
        alpha=alpha,
        budget=budget,
        verdict="fail" if beyond else "ok" if high <= budget else "unclear",
        smallest=100.0 * smallest,
        needed=items_needed(budget / 100.0, discordance, alpha=alpha),
    )


def _t_bounds(difference: Array, alpha: float) -> tuple[float, float]:
    n = len(difference)
    mean = float(difference.mean())
    if n < 2:
        return float("-inf"), float("inf")
    half = t_value(1.0 - 2.0 * alpha, n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    return 100.0 * (mean - half), 100.0 * (mean + half)


def _rise_row(name: str, part: pd.DataFrame, budget: float | None, alpha: float) -> GateRow:
    """Rise of a perplexity in percent; texts are the items, the log-ratio per token has a Student-t interval."""
    before, after = part["score_before"].to_numpy(dtype=float), part["score_after"].to_numpy(dtype=float)
    weight = part["weight_before"].to_numpy(dtype=float)
    if not np.array_equal(weight, part["weight_after"].to_numpy(dtype=float)):
        raise UserError(f"task '{name}': the two sides count different tokens; perplexities can't be compared.")
    rise = ratio_interval(after - before, weight, 1.0 - 2.0 * alpha)
    drop, low, high = (100.0 * math.expm1(min(x, 50.0)) for x in rise)
    verdict: Verdict = "shown"
    if budget is not None:
        verdict = "fail" if low > budget else "ok" if high <= budget else "unclear"
    perplexities = [math.exp(min(float(x.sum() / weight.sum()), 700.0)) for x in (before, after)]
    return GateRow(
        name=name,
        metric="perplexity",
        n=len(part),
        before=perplexities[0],
        after=perplexities[1],
        drop=drop,
        low=low,
        high=high,
        lost=int((after > before).sum()),
        won=int((after < before).sum()),
        alpha=alpha,
        budget=float("nan") if budget is None else budget,
        verdict=verdict,
    )


def simulate(
    sizes: Sequence[int],
    drops: Sequence[float],
    discordance: float,
    *,
    max_drop: float = 1.0,
    alpha: float = ALPHA,
    runs: int = 2000,
    seed: int = 0,
) -> float:
    """Share of simulated checks that fail. ``drops`` and ``discordance`` are fractions, one true drop per task.

    Each item is lost with chance (ψ + δ)/2 and won with (ψ − δ)/2, ψ = max(discordance, drop).
    """
    generator = np.random.default_rng(seed)
    share = [max(discordance, drop) for drop in drops]
    drawn = np.stack(
        [
            generator.multinomial(n, [(total + drop) / 2, (total - drop) / 2, 1.0 - total], size=runs)
            for n, drop, total in zip(sizes, drops, share)
        ]
    ).astype(np.float64)
    lost, won, n = drawn[:, :, 0], drawn[:, :, 1], np.asarray(sizes, dtype=np.float64)[:, None]
    pooled = len(sizes) > 1
    failed = _beyond(lost, won, n, max_drop / 100.0, (alpha / 2 if pooled else alpha) / len(sizes)).any(axis=0)
    if pooled:
        failed |= _beyond(lost.sum(axis=0), won.sum(axis=0), n.sum(keepdims=True)[0], max_drop / 100.0, alpha / 2)
    return float(failed.mean())


def _beyond(lost: Array, won: Array, n: Array, budget: float, level: float) -> NDArray[np.bool_]:
    """The rule of `_drop_row` on arrays: low > budget exactly when the score statistic at the budget exceeds z."""
    beyond = score_statistic(lost, won, n, budget) > NormalDist().inv_cdf(1.0 - level)
    tails = {pair: coin_tail(*pair) for pair in {(int(b), int(b + c)) for b, c in zip(lost[beyond], won[beyond])}}
    exact = np.zeros(beyond.shape, dtype=bool)
    exact[beyond] = [tails[int(b), int(b + c)] <= level for b, c in zip(lost[beyond], won[beyond])]
    return exact
