"""A drop in score, split into what came back after restoring and what did not (paper 2, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.diagnose.bootstrap import Contrast, Interval, contrasts
from holdfast.errors import UserError

Verdict = Literal["none", "pseudo", "actual", "undecided", "withheld"]
MARGIN = 0.02  # the smallest drop that matters, in the units of the scores: two points of accuracy
ROLES = ("base", "tuned", "restored", "control")


@dataclass(frozen=True)
class Decomposition:
    """drop (B-T) = pattern shift (R-T) + knowledge loss (B-R), with paired intervals and a verdict.

    ``control`` is B-C, what restoring alone does to the base; ``excess`` is C-R, the loss beyond that. Scores and
    differences are in the units of the arrays (fractions for 0/1 outcomes). ``items_needed`` is the number of items
    at which an ``undecided`` verdict would fall if the measured differences are the true ones (None: no number would).
    """

    verdict: Verdict
    reason: str
    drop: Interval
    pattern_shift: Interval
    knowledge_loss: Interval
    control: Interval | None
    excess: Interval | None
    scores: dict[str, float]
    items: int
    items_needed: int | None = None

    def withheld(self, why: str) -> Decomposition:
        """The same numbers without a verdict; ``none`` stays, because it needs no restored model."""
        if self.verdict == "none":
            return self
        return replace(self, verdict="withheld", reason=why, items_needed=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [("drop", self.drop), ("pattern shift", self.pattern_shift), ("knowledge loss", self.knowledge_loss)]
        parts += [("control", self.control)] if self.control else []
        numbers = ", ".join(f"{name} {interval.in_points()}" for name, interval in parts if interval)
        return f"{self.verdict}: {numbers} points, {self.items} items; {self.reason}"


def decompose(
    base: ArrayLike,
    tuned: ArrayLike,
    restored: ArrayLike,
    control: ArrayLike | None = None,
    *,
    margin: float = MARGIN,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Decomposition:
    """Split the drop from base to tuned into pattern shift and knowledge loss, and judge it.

    B - T = (R - T) + (B - R), each a mean over the same items (paper 2, sections 3.1 and 4). The arrays hold one score
    per item, 0/1 or real, in the same order; ``control`` is the base model restored. Intervals come from a paired
    bootstrap; an interval of 0/1 scores leaves out zero only where the exact sign test agrees. Verdicts:

    - ``actual``: a drop, and B-R above 0 (and above what the control lost, where one is given) by something that
      matters: at least ``margin`` or half of the drop, whichever is less; also without a drop if restoring takes away a
      gain in format and shows a loss that the control doesn't have;
    - ``pseudo``: a drop, B-R not above 0 (or by no more than what the control lost, or than what matters), and at most
      half of the drop (or ``margin``) can still be knowledge loss;
    - ``none``: no drop, and any drop larger than ``margin`` is ruled out;
    - ``undecided``: the items can't tell; ``items_needed`` says how many could.

    Cost: O(resamples) for 0/1 scores, O(resamples x items) otherwise. Raises UserError for empty, unequal or
    non-finite arrays.
    """
    arrays = {"base": base, "tuned": tuned, "restored": restored}
    if control is not None:
        arrays["control"] = control
    return decompose_benchmarks(
        {"scores": arrays}, margin=margin, confidence=confidence, resamples=resamples, seed=seed
    )["pooled"]


def decompose_benchmarks(
    benchmarks: Mapping[str, Mapping[str, ArrayLike]],
    *,
    margin: float = MARGIN,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Decomposition]:
    """``decompose`` for each benchmark and, under ``pooled``, for the mean over benchmarks (each weighs the same).

    ``benchmarks`` maps a name to arrays by role (base, tuned, restored and, for all or none, control). Items are
    resampled within their benchmark.
    """
    if "pooled" in benchmarks:
        raise UserError("a benchmark can't be called 'pooled'; that name is the mean over all of them")
    if not benchmarks:
        raise UserError("nothing to decompose: no benchmark has scores")
    tables = {name: _table(name, roles) for name, roles in benchmarks.items()}
    if len({table.shape[1] for table in tables.values()}) > 1:
        raise UserError("some benchmarks have a control and some have not; give it for all or for none")
    if not 0 < confidence < 1 or resamples < 100 or not margin > 0:
        raise UserError("decompose: 0 < confidence < 1, resamples >= 100 and margin > 0 are needed")
    result = {}
    for name, table in tables.items():
        result[name] = _decomposition([table], margin, confidence, resamples, seed)
    single = len(tables) == 1
    pooled = list(tables.values())
    result["pooled"] = (
        next(iter(result.values())) if single else _decomposition(pooled, margin, confidence, resamples, seed)
    )
    return result


def _table(name: str, roles: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    """items x roles, checked."""
    missing = [role for role in ROLES[:3] if role not in roles]
    if missing:
        raise UserError(f"{name}: scores of {', '.join(missing)} are missing")
    columns = [np.asarray(roles[role], dtype=np.float64).reshape(-1) for role in ROLES if role in roles]
    lengths = {role: len(column) for role, column in zip([r for r in ROLES if r in roles], columns)}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{name}: the models must be scored on the same items, but the numbers of items are {lengths}")
    table = np.stack(columns, axis=1)
    if not len(table):
        raise UserError(f"{name}: no items")
    if not np.isfinite(table).all():
        raise UserError(f"{name}: {int((~np.isfinite(table)).any(axis=1).sum())} items have scores that are not finite")
    return table


def _decomposition(
    tables: Sequence[NDArray[np.float64]], margin: float, confidence: float, resamples: int, seed: int
) -> Decomposition:
    means = np.mean([table.mean(axis=0) for table in tables], axis=0)
    signs = {"drop": (1, -1, 0, 0), "pattern_shift": (0, -1, 1, 0), "knowledge_loss": (1, 0, -1, 0)}
    if tables[0].shape[1] == 4:
        signs |= {"control": (1, 0, 0, -1), "excess": (0, 0, -1, 1)}
    found = contrasts(tables, signs, confidence=confidence, resamples=resamples, seed=seed)
    verdict, reason, needed = judge(found, margin)
    intervals = {name: contrast.interval for name, contrast in found.items()}
    return Decomposition(
        verdict=verdict,
        reason=reason,
        drop=intervals["drop"],
        pattern_shift=intervals["pattern_shift"],
        knowledge_loss=intervals["knowledge_loss"],
        control=intervals.get("control"),
        excess=intervals.get("excess"),
        scores=dict(zip(ROLES, (float(mean) for mean in means))),
        items=sum(len(table) for table in tables),
        items_needed=None if needed is None else max(1, math.ceil(needed)),
    )


def judge(found: Mapping[str, Contrast], margin: float) -> tuple[Verdict, str, float | None]:
    """Verdict, its reason, and the number of items that would decide it, from the contrasts."""
    drop, loss, shift = found["drop"], found["knowledge_loss"], found["pattern_shift"]
    excess = found.get("excess")
    lost = loss.interval.low > 0
    beyond_control = lost and (excess is None or excess.interval.low > 0)
    if drop.interval.low > 0:
        half = drop.interval.value / 2
        if beyond_control and (excess or loss).interval.value >= min(margin, half):
            return "actual", "the restored model stays below the base", None
        bound = max(margin, half)
        little = f"below {100 * min(margin, half):.1f} points" + (" beyond the control's" if excess else "")
        if beyond_control and loss.interval.high > bound:
            why = f"a loss {little} is shown, but a larger one is not ruled out"
            return "undecided", why, loss.items_to_bound(bound)
        if beyond_control:
            return "pseudo", f"restoring brings the score back but for a loss {little}", None
        if loss.interval.high <= bound:
            back = "as far as it leaves the base itself" if lost else "back"
            return "pseudo", f"restoring brings the score {back}", None
        if lost and excess is not None:
            why = "the restored model stays below the base, but so does the control: restoring itself costs that much"
            return "undecided", why, excess.items_to_show()
        why = "there is a drop, but the items can't tell whether restoring brings it back"
        return "undecided", why, _least(loss.items_to_show(), loss.items_to_bound(bound))
    if beyond_control and excess is not None and shift.interval.high < 0:
        return "actual", "no drop is visible, but restoring removes a gain in format and shows a loss", None
    if drop.interval.high <= margin:
        return "none", "there is no drop", None
    why = f"a drop is not shown, and one above {100 * margin:g} points is not ruled out"
    return "undecided", why, _least(drop.items_to_show(), drop.items_to_bound(margin))


def _least(*numbers: float | None) -> float | None:
    return min((number for number in numbers if number is not None), default=None)
