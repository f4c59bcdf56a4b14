"""Does one number predict another? Rank correlation with an interval, for flatness against forgetting."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holdfast.errors import UserError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation. ``low``, ``high``: 95 % percentile interval; ``n``: pairs; ``clusters``: groups."""

    value: float
    low: float
    high: float
    n: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}] (n = {self.n}, {self.clusters} groups)"


def rank_correlation(
    x: Sequence[float],
    y: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = 4000,
    seed: int = 0,
) -> Correlation:
    """Spearman's ρ of x and y: Pearson's correlation of their ranks, ties given their mean rank.

    The interval is a bootstrap over ``groups`` (say arms, whose seeds are no independent evidence), drawn whole;
    without groups every pair is its own. Pairs with a value that isn't finite are left out. NaN where a side is
    constant. Raises UserError for sides of different length or fewer than three pairs.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    names = list(groups) if groups is not None else list(range(len(a)))
    if not len(a) == len(b) == len(names):
        raise UserError(f"rank correlation needs sides of one length, not {len(a)}, {len(b)} and {len(names)} groups")
    kept = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
    if len(kept) < 3:
        raise UserError(f"rank correlation needs at least three finite pairs, not {len(kept)}")
    members: dict[Hashable, list[int]] = {}
    for index in kept:
        members.setdefault(names[index], []).append(int(index))
    blocks = [np.array(block) for block in members.values()]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples if len(blocks) > 1 else 0):
        chosen = np.concatenate([blocks[i] for i in rng.integers(0, len(blocks), len(blocks))])
        drawn.append(_spearman(a[chosen], b[chosen]))
    finite = np.array([value for value in drawn if np.isfinite(value)])
    low, high = (float(q) for q in np.quantile(finite, [0.025, 0.975])) if finite.size else (np.nan, np.nan)
    return Correlation(_spearman(a[kept], b[kept]), low, high, len(kept), len(blocks))


def _spearman(a: Array, b: Array) -> float:
    ranks = [_ranks(side) - _ranks(side).mean() for side in (a, b)]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / scale) if scale > 0 else float("nan")


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
