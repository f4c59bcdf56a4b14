"""Paired bootstrap of differences between models that answered the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

FEW_PATTERNS = 64  # up to this many distinct rows a resample is one multinomial draw, whatever the number of items
FEW_CHANGES = 20  # below this many changed 0/1 items a percentile interval is too narrow
CHUNK = 1 << 22  # indices drawn at a time otherwise: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean difference with its confidence bounds, in the units of the scores."""

    value: float
    low: float
    high: float

    def in_points(self) -> str:
        """``12.0 [9.1, 14.8]``: in percentage points."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Contrast:
    """One difference of models: its interval, the bootstrap's own bounds, and what the sign test says.

    ``p_above`` is the one-sided sign test's probability of so many items above zero by chance (items that did not
    change left out); ``alpha`` is the one-sided level.
    """

    interval: Interval
    raw_low: float
    raw_high: float
    items: int
    p_above: float
    alpha: float

    def items_to_show(self) -> float | None:
        """Items at which the interval would lie above zero, if the measured difference is the true one."""
        value = self.interval.value
        if value <= 0:
            return None
        by_width = self.items * ((value - self.raw_low) / value) ** 2
        # The sign test's log p falls in proportion to the items.
        by_sign = self.items * math.log(self.alpha) / math.log(self.p_above) if self.p_above < 1 else math.inf
        needed = max(by_width, by_sign)
        return max(needed, self.items + 1) if math.isfinite(needed) else None

    def items_to_bound(self, bound: float) -> float | None:
        """Items at which the interval would lie below ``bound``, if the measured difference is the true one."""
        room = bound - self.interval.value
        if room <= 0:
            return None
        return max(self.items * ((self.raw_high - self.interval.value) / room) ** 2, self.items + 1)


def contrasts(
    tables: Sequence[NDArray[np.float64]],
    signs: Mapping[str, Sequence[int]],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Contrast]:
    """Percentile intervals of linear contrasts of column means, averaged over tables (items x columns).

    Items are resampled within their table, all columns of an item together. An interval keeps zero where a sign test
    at the same level doesn't exclude it, and covers the adjusted Wald interval where few 0/1 items changed: there the
    bootstrap alone is too sure (four drops among 500 items would do).
    """
    rng = np.random.default_rng(seed)
    matrix = np.array([row[: tables[0].shape[1]] for row in signs.values()], dtype=np.float64)  # contrasts x columns
    draws = np.mean([_resampled_means(table, rng, resamples) for table in tables], axis=0) @ matrix.T
    alpha = (1 - confidence) / 2
    low, high = np.quantile(draws, [alpha, 1 - alpha], axis=0)
    result = {}
    for index, name in enumerate(signs):
        changes = [table @ matrix[index] for table in tables]
        value = float(np.mean([change.mean() for change in changes]))
        above, below = (sum(int((sign * c > 1e-12).sum()) for c in changes) for sign in (1, -1))
        binary = len(tables) == 1 and bool(np.isin(tables[0], (0.0, 1.0)).all())
        p_above, p_below = _sign_p(above, below, binary), _sign_p(below, above, binary)
        raw_low, raw_high = float(low[index]), float(high[index])
        if binary and 0 < above + below < FEW_CHANGES:
            adjusted = _adjusted_wald(above, below, len(tables[0]), confidence)
            raw_low, raw_high = min(raw_low, adjusted[0]), max(raw_high, adjusted[1])
        interval = Interval(
            value,
            raw_low if p_above <= alpha else min(raw_low, 0.0),
            raw_high if p_below <= alpha else max(raw_high, 0.0),
        )
        result[name] = Contrast(interval, raw_low, raw_high, sum(map(len, tables)), p_above, alpha)
    return result


def _resampled_means(table: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """resamples x columns."""
    rows, counts = np.unique(table, axis=0, return_counts=True)
    items = len(table)
    if len(rows) <= FEW_PATTERNS:
        drawn = rng.multinomial(items, counts / items, size=resamples)
        return (drawn @ rows) / items
    means = np.empty((resamples, table.shape[1]))
    step = max(1, CHUNK // items)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        picked = rng.integers(items, size=(stop - start, items))
        for column in range(table.shape[1]):
            means[start:stop, column] = table[:, column][picked].mean(axis=1)
    return means


def _adjusted_wald(above: int, below: int, items: int, confidence: float) -> tuple[float, float]:
    """Bounds of a paired difference of proportions, half an item added to each of the four cells (Agresti and Min)."""
    total, up, down = items + 2, above + 0.5, below + 0.5
    centre = (up - down) / total
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(up + down - (up - down) ** 2 / total) / total
    return centre - half, centre + half


def _sign_p(above: int, below: int, binary: bool) -> float:
    """P(at least ``above`` of the changed items | either direction equally likely).

    For scores that aren't 0/1 a mean may differ though the signs don't, so only the best possible p counts: it keeps
    a handful of changed items from showing anything.
    """
    changed = above + below
    if not changed:
        return 1.0
    if not binary:
        return 0.5**changed
    if above > 2000 or below > 2000:  # normal approximation: exact to four digits here
        return 0.5 * math.erfc((above - 0.5 - changed / 2) / math.sqrt(changed / 2))
    tail = range(above, changed + 1)
    logs = [math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1) for k in tail]
    top = max(logs)
    return min(1.0, math.exp(top - changed * math.log(2)) * sum(math.exp(log - top) for log in logs))
