"""SC, AG and MAG against closed forms, and what is said about grids that can't carry them."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.errors import UserError
from holdfast.landscape import Spread, Surface, flatness, summarize


def quadratic(n: int = 9, h: float = 0.25) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    axis = (np.arange(n) - n // 2) * h
    x, y = np.meshgrid(axis, axis, indexing="ij")
    f = 2.0 + 0.3 * x - 0.7 * y + 1.5 * x**2 - 0.25 * y**2 + 0.8 * x * y
    return f, axis, 0.3 + 3.0 * x + 0.8 * y, -0.7 - 0.5 * y + 0.8 * x


def plain_mag(f: np.ndarray) -> float:
    """The definition, pair by pair."""
    pairs = [abs(f[i, j] - f[i - 1, j]) for i in range(1, f.shape[0]) for j in range(f.shape[1])]
    pairs += [abs(f[i, j] - f[i, j - 1]) for i in range(f.shape[0]) for j in range(1, f.shape[1])]
    return float(np.mean(pairs))


def test_a_quadratic_has_the_metrics_of_its_derivatives() -> None:
    f, _, fx, fy = quadratic()
    found = flatness(f, 0.25)
    assert found.sc == pytest.approx(3.0 - 0.5, rel=1e-10)
    assert found.ag == pytest.approx(np.hypot(fx, fy).mean(), rel=1e-10)
    assert found.mag == pytest.approx(plain_mag(f), rel=1e-10)
    assert found.percent == {"SC": 100 * found.sc, "AG": 100 * found.ag, "MAG": 100 * found.mag}


def test_each_axis_has_its_own_spacing() -> None:
    axis_x, axis_y = np.linspace(-1, 1, 7), np.linspace(-3, 3, 5)
    x, y = np.meshgrid(axis_x, axis_y, indexing="ij")
    found = flatness(x**2 + 2 * y**2, (axis_x[1] - axis_x[0], axis_y[1] - axis_y[0]))
    assert found.sc == pytest.approx(6.0, rel=1e-10)
    assert found.ag == pytest.approx(np.hypot(2 * x, 4 * y).mean(), rel=1e-10)


def test_a_saddle_of_opposite_curvatures_is_flat_by_sc_and_a_plane_by_all_but_its_slope() -> None:
    axis = np.linspace(-1, 1, 5)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    assert flatness(x**2 - y**2, 0.5).sc == pytest.approx(0, abs=1e-12)
    slope = flatness(3 * x + 4 * y, 0.5)
    assert slope.ag == pytest.approx(5.0)
    assert slope.sc == pytest.approx(0, abs=1e-12)
    assert slope.mag == pytest.approx((1.5 + 2.0) / 2)


def test_points_that_are_not_finite_are_excluded_and_counted() -> None:
    f, _, _, _ = quadratic()
    f[0, 0], f[-1, 3] = np.nan, np.inf
    found = flatness(f, 0.25)
    assert (found.points, found.excluded) == (79, 2)
    assert found.sc == pytest.approx(2.5, rel=1e-10)  # every difference that is left is exact
    assert np.isfinite([found.ag, found.mag]).all()
    surface = Surface(f, np.arange(9.0), np.arange(9.0), 2.0)
    assert "2 of 81 grid points are not finite" in surface.notes()[0]
    assert np.isnan(flatness(np.full((3, 3), np.nan), 1.0).sc)


def test_rounding_noise_is_told_from_a_surface() -> None:
    f, axis, _, _ = quadratic(11)
    assert flatness(f, 0.25).noise_share == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(41, 41)) * 3e-7
    found = flatness(2.0 + noise, 1e-4)
    assert found.noise == pytest.approx(3e-7, rel=0.1)
    assert found.noise_share is not None and found.noise_share > 0.9
    small = Surface(2.0 + noise, np.arange(41.0) * 1e-4, np.arange(41.0) * 1e-4, 2.0, {"compute": "float32"})
    assert "range is too small" in small.notes()[0]
    rough = Surface(2.0 + rng.normal(size=(41, 41)), np.arange(41.0), np.arange(41.0), 2.0, {"compute": "float32"})
    assert "too coarse" in rough.notes()[0]
    assert Surface(f, axis, axis, 2.0).notes() == []


@pytest.mark.parametrize(
    ("grid", "spacing"), [(np.zeros((2, 5)), 1.0), (np.zeros(9), 1.0), (np.zeros((3, 3)), 0.0), (np.zeros((3, 3)), -1)]
)
def test_what_cannot_be_measured_is_refused(grid: np.ndarray, spacing: float) -> None:
    with pytest.raises(UserError):
        flatness(grid, spacing)


def test_several_planes_give_an_interval_and_one_says_that_it_has_none() -> None:
    f, axis, _, _ = quadratic()
    planes = [Surface(f * scale, axis, axis, 2.0) for scale in (1.0, 2.0, 3.0)]
    found = summarize(planes)
    assert found.sc.mean == pytest.approx(5.0)
    # t quantile 4.303 for two degrees of freedom, standard deviation 2.5
    assert found.sc.high - found.sc.mean == pytest.approx(4.303 * 2.5 / np.sqrt(3), rel=1e-6)
    single = summarize(planes[:1])
    assert np.isnan(single.sc.low)
    assert any("anecdote" in note for note in single.notes)
    with pytest.raises(UserError, match="different grids"):
        summarize([planes[0], Surface(f, axis * 2, axis, 2.0)])
    assert str(Spread((1.0,))) == "1 (one plane: no interval)"
