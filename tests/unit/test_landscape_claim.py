"""Rank correlation against scipy, and its interval over groups."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from holdfast.errors import UserError
from holdfast.landscape import rank_correlation


def test_it_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 40).astype(float)
    y = x + rng.normal(size=40).round(1)
    found = rank_correlation(x.tolist(), y.tolist())
    assert found.value == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)
    assert -1 <= found.low < found.value < found.high <= 1


def test_seeds_of_one_arm_are_not_independent_evidence() -> None:
    rng = np.random.default_rng(1)
    arms = np.repeat(np.arange(5), 20)
    x = rng.normal(size=5)[arms] + 0.01 * rng.normal(size=100)
    y = rng.normal(size=5)[arms] + 0.01 * rng.normal(size=100)
    alone = rank_correlation(x.tolist(), y.tolist())
    grouped = rank_correlation(x.tolist(), y.tolist(), arms.tolist())
    assert grouped.clusters == 5 and alone.clusters == 100
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_what_carries_no_correlation() -> None:
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]).value)
    assert rank_correlation([1, 2, 3, np.nan], [1, 2, 3, 0]).n == 3
    with pytest.raises(UserError, match="three"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(UserError, match="length"):
        rank_correlation([1, 2, 3], [1, 2])
