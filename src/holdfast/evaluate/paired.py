"""Two checkpoints on the same items: paired intervals, exact tests, power. A drop is before − after, as a fraction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.errors import UserError
from holdfast.evaluate.intervals import Array, Estimate, McNemar, SeedRange, scores_array, t_value, z_value

RESAMPLES = 10_000
NOISE_FLOOR = 0.02  # discordance assumed at least when a panel's power is stated: two real checkpoints differ by some


def _differences(before: ArrayLike, after: ArrayLike) -> Array:
    first, second = scores_array(before, "before"), scores_array(after, "after")
    if first.shape != second.shape:
        raise UserError(f"paired scores need the same items: {len(first)} before, {len(second)} after.")
    return first - second


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    weights: ArrayLike | None = None,
) -> Estimate:
    """Mean drop (before − after) with a percentile interval over resampled items (Efron 1979).

    ``weights`` (for instance tokens) make it a weighted mean of the items' differences. Items are resampled as pairs,
    so what both checkpoints share cancels. Items that either side could not score (NaN) are left out. Cost:
    ``resamples`` × distinct differences, not × items, where few differ.
    """
    difference = _differences(before, after)
    weight = np.ones(len(difference)) if weights is None else scores_array(weights, "weights")
    scored = ~np.isnan(difference)
    difference, weight = difference[scored], weight[scored]
    n = len(difference)
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    pairs, counts = np.unique(np.stack([difference, weight]), axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    means = []
    block = max(1, 4_000_000 // pairs.shape[1])
    for start in range(0, resamples, block):
        drawn = generator.multinomial(n, counts / n, size=min(block, resamples - start))
        total = drawn @ pairs[1]
        means.append((drawn @ (pairs[0] * pairs[1])) / np.where(total > 0, total, np.nan))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.nanpercentile(np.concatenate(means), [tail, 100.0 - tail])
    return Estimate(float((difference * weight).sum() / weight.sum()), float(low), float(high))


def mcnemar(before: ArrayLike, after: ArrayLike) -> McNemar:
    """Exact McNemar test on 0/1 outcomes: the discordant items are fair coin flips if nothing changed."""
    difference = _differences(before, after)
    lost, won = int((difference > 0).sum()), int((difference < 0).sum())
    tail = min(coin_tail(max(lost, won), lost + won), 1.0)
    return McNemar(lost, won, min(1.0, 2.0 * tail), coin_tail(lost, lost + won))


def coin_tail(heads: int, flips: int) -> float:
    """P(at least ``heads`` heads in ``flips`` fair flips), exact but for rounding."""
    if heads <= 0:
        return 1.0
    if heads > flips:
        return 0.0
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, flips + 1)))])
    k = np.arange(heads, flips + 1)
    return float(min(1.0, np.exp(logs[flips] - logs[k] - logs[flips - k] - flips * math.log(2.0)).sum()))


def score_statistic(lost: ArrayLike, won: ArrayLike, n: ArrayLike, drop: ArrayLike) -> NDArray[np.float64]:
    """Tango's score statistic (1998) of H0: the true drop is ``drop``, for paired 0/1 outcomes; broadcasts.

    z = (lost − won − n·δ) / √(n·(2q + δ(1−δ))), q the constrained estimate of the chance to win an item.
    """
    b, c, size, delta = (np.asarray(x, dtype=np.float64) for x in (lost, won, n, drop))
    linear = -b - c + (2 * size - b + c) * delta
    constant = -c * delta * (1 - delta)
    root = np.sqrt(np.maximum(linear**2 - 8 * size * constant, 0.0))
    q = np.maximum((root - linear) / (4 * size), 0.0)
    variance = size * (2 * q + delta * (1 - delta))
    difference = b - c - size * delta
    with np.errstate(divide="ignore", invalid="ignore"):
        z = difference / np.sqrt(np.maximum(variance, 0.0))
    return np.where(np.isnan(z), 0.0, z)


def drop_bounds(lost: ArrayLike, won: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[Array, Array]:
    """One-sided lower and upper bounds, each at level ``alpha``, of a paired 0/1 drop: inverted score tests."""
    b, c, size = (np.asarray(x, dtype=np.float64) for x in (lost, won, n))
    levels = np.asarray(alpha, dtype=np.float64)
    z = np.vectorize(lambda a: NormalDist().inv_cdf(1.0 - a), otypes=[np.float64])(levels)
    b, c, size, z = np.broadcast_arrays(b, c, size, z)
    observed = (b - c) / size
    bounds = []
    for sign in (1.0, -1.0):
        inside, outside = observed.copy(), np.full(b.shape, -sign)
        for _ in range(50):
            middle = (inside + outside) / 2
            beyond = sign * score_statistic(b, c, size, middle) > z
            outside, inside = np.where(beyond, middle, outside), np.where(beyond, inside, middle)
        bounds.append((inside + outside) / 2)
    return bounds[0], bounds[1]


def paired_interval(before: ArrayLike, after: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Two-sided interval of the mean drop: Tango's for 0/1 outcomes, Student's t for other scores."""
    difference = _differences(before, after)
    n = len(difference)
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    mean = float(difference.mean())
    if np.isin(difference, (-1.0, 0.0, 1.0)).all():
        low, high = drop_bounds((difference > 0).sum(), (difference < 0).sum(), n, (1.0 - confidence) / 2)
        return Estimate(mean, float(low), float(high))
    if n == 1:
        return Estimate(mean, float("-inf"), float("inf"))
    half = t_value(confidence, n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def power(n: int, drop: float, discordance: float, *, alpha: float = 0.05, budget: float = 0.0) -> float:
    """Chance that a one-sided test on n items sees a true drop exceed ``budget`` (normal approximation).

    ``discordance``: share of items on which the checkpoints disagree (at least the drop itself).
    """
    share = max(discordance, drop, 1e-12)
    spread = math.sqrt(max(share - drop * drop, 1e-12) / n)
    critical = budget + z_value(1.0 - alpha, 1) * math.sqrt(max(share - budget * budget, 1e-12) / n)
    return 1.0 - NormalDist(drop, spread).cdf(critical)


def minimum_detectable_drop(
    n: int, discordance: float = NOISE_FLOOR, *, alpha: float = 0.05, target: float = 0.8, budget: float = 0.0
) -> float:
    """The smallest true drop that n paired items show to exceed ``budget`` with probability ``target``."""
    if n < 1:
        return float("nan")
    low, high = budget, 1.0
    if power(n, high, discordance, alpha=alpha, budget=budget) < target:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if power(n, middle, discordance, alpha=alpha, budget=budget) < target:
            low = middle
        else:
            high = middle
    return high


def items_needed(budget: float, discordance: float = NOISE_FLOOR, *, alpha: float = 0.05) -> int:
    """Items with which an unchanged model's upper bound would stay within ``budget``: ψ·(z/budget)²."""
    return math.ceil(max(discordance, NOISE_FLOOR) * (z_value(1.0 - alpha, 1) / budget) ** 2) if budget > 0 else 0


def holm(p_values: Mapping[str, float] | Sequence[float]) -> dict[str, float] | list[float]:
    """Holm's step-down adjustment: p-values that may be compared with α however many arms were tested."""
    names = list(p_values) if isinstance(p_values, Mapping) else list(range(len(p_values)))
    values = np.asarray(list(p_values.values()) if isinstance(p_values, Mapping) else list(p_values), dtype=np.float64)
    order = np.argsort(values)
    stepped = np.minimum(1.0, np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values)))))
    adjusted = np.empty_like(values)
    adjusted[order] = stepped
    if isinstance(p_values, Mapping):
        return {str(name): float(value) for name, value in zip(names, adjusted)}
    return [float(value) for value in adjusted]


def seed_range(values: ArrayLike) -> SeedRange:
    """Spread of one figure over seeds; kept apart from item noise, which more seeds do not shrink."""
    array = scores_array(values, "values")
    if len(array) == 0:
        raise UserError("no seeds to summarize.")
    deviation = float(array.std(ddof=1)) if len(array) > 1 else float("nan")
    return SeedRange(float(array.mean()), float(array.min()), float(array.max()), deviation, len(array))
