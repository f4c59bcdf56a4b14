"""Intervals and paired tests on per-item outcomes; numpy only. Fractions in, fractions out (0.03 is 3 points)."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.errors import UserError

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Exact McNemar test: items only ``before`` got right, items only ``after`` got right, two p-values."""

    lost: int
    won: int
    p_value: float  # two-sided
    p_drop: float  # one-sided: that at least so many of the discordant items were lost


class SeedRange(NamedTuple):
    """Spread over seeds, which is not the noise over items: mean, least, greatest, standard deviation, seeds."""

    mean: float
    least: float
    greatest: float
    deviation: float
    seeds: int


def scores_array(scores: ArrayLike, name: str = "scores") -> Array:
    """One-dimensional float64 scores; UserError otherwise."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise UserError(f"{name} must be one-dimensional, got shape {values.shape}.")
    return values


def z_value(confidence: float, sides: int = 2) -> float:
    """Standard normal quantile of a one- or two-sided interval."""
    return NormalDist().inv_cdf(1.0 - (1.0 - confidence) / sides)


@lru_cache(maxsize=4096)
def t_value(confidence: float, freedom: float) -> float:
    """Two-sided Student t quantile, by bisection on the regularised incomplete beta function."""
    if freedom < 1:
        return float("inf")
    low, high, tail = 0.0, 1e4, 1.0 - confidence
    for _ in range(60):
        middle = (low + high) / 2
        if _t_tail(middle, freedom) > tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_tail(t: float, freedom: float) -> float:
    """Two-sided tail probability of Student's t: numeric integral of the density in x = √ν·tan u."""
    upper = math.atan(t / math.sqrt(freedom))
    u = np.linspace(0.0, upper, 401)
    density = np.cos(u) ** (freedom - 1)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    weight = np.ones(401)
    weight[1:-1:2], weight[2:-1:2] = 4.0, 2.0
    return 1.0 - 2.0 * scale * float((density * weight).sum()) * upper / 400 / 3.0


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a proportion: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    p, z = successes / n, z_value(confidence)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(scores: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean with Wilson's interval for 0/1 scores, Student's t otherwise; NaN without scores."""
    values = scores_array(scores)
    n = len(values)
    if n == 0 or np.isin(values, (0.0, 1.0)).all():
        return wilson(float(values.sum()), n, confidence)
    if n == 1:
        return Estimate(float(values[0]), float("-inf"), float("inf"))
    half = t_value(confidence, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half)


def ratio_interval(scores: ArrayLike, weights: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Σ scores / Σ weights over independent texts, with a jackknife Student-t interval."""
    values, weight = scores_array(scores), scores_array(weights, "weights")
    n = len(values)
    if n == 0 or weight.sum() <= 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    ratio = float(values.sum() / weight.sum())
    if n == 1:
        return Estimate(ratio, float("-inf"), float("inf"))
    share = weight / weight.sum()
    pull = (values - ratio * weight) / weight.sum() / (1.0 - share)  # what leaving one text out would change
    freedom = max(1.0, round(float((share**2).sum() ** 2 / (share**4).sum()), 1) - 1.0)  # long texts count for few
    half = t_value(confidence, freedom) * float(np.sqrt((pull**2).sum()))
    return Estimate(ratio, ratio - half, ratio + half)
