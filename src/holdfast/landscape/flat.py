"""Flatness of a loss surface: the three numbers of paper 1 (2406.04836, A.3), from the grid alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import UserError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Flatness:
    """SC, AG and MAG of one grid; smaller is flatter.

    ``points`` are the finite grid points, ``excluded`` the others; an average leaves out every difference that
    touches a point that is not finite. ``noise`` is the estimated rounding noise of one grid point, in the unit
    of the loss (None for a grid of fewer than five points a side), ``noise_share`` the part of the second
    differences that such noise explains, 0 to 1.
    """

    sc: float
    ag: float
    mag: float
    points: int
    excluded: int
    noise: float | None = None
    noise_share: float | None = None

    @property
    def percent(self) -> dict[str, float]:
        """The three numbers times 100, the unit of the paper's Table 1."""
        return {"SC": 100 * self.sc, "AG": 100 * self.ag, "MAG": 100 * self.mag}


def flatness(grid: npt.ArrayLike, spacing: float | tuple[float, float]) -> Flatness:
    """Average curvature, gradient and step of an N x M grid of losses f[i, j] = L(θ + αᵢδ₁ + βⱼδ₂).

    SC = mean |f_xx + f_yy|, AG = mean ‖∇f‖₂, MAG = mean |tᵢ − tᵢ₋₁| over all pairs of neighbours along both axes
    (2406.04836, A.3, equations 3 to 6; AG as the mean of the norms). Derivatives are three-point differences, at
    the rim one-sided, all of them exact on a quadratic. ``spacing``: distance of neighbouring points along each
    axis (one number, or one per axis). SC and AG are per unit of α and β; MAG is per grid step, so it compares
    only grids of equal spacing. Points that are not finite are excluded and counted.

    Raises UserError for a grid smaller than 3 x 3 or a spacing that is not positive.
    """
    f = np.asarray(grid, dtype=np.float64)
    if f.ndim != 2 or min(f.shape) < 3:
        raise UserError(f"flatness needs a two-dimensional grid of at least 3 x 3 points, not shape {f.shape}")
    steps: tuple[float, float] = (float(spacing), float(spacing)) if np.isscalar(spacing) else tuple(spacing)  # type: ignore[arg-type,assignment]
    if len(steps) != 2 or not all(math.isfinite(step) and step > 0 for step in steps):
        raise UserError(f"spacing must be positive, one number or one per axis, not {spacing!r}")
    finite = np.isfinite(f)
    f = np.where(finite, f, np.nan)
    (fx, fxx), (fy, fyy) = _derivatives(f, 0, steps[0]), _derivatives(f, 1, steps[1])
    differences = np.concatenate([np.diff(f, axis=0).ravel(), np.diff(f, axis=1).ravel()])
    noise, share = _noise(f)
    return Flatness(
        sc=_mean(np.abs(fxx + fyy)),
        ag=_mean(np.hypot(fx, fy)),
        mag=_mean(np.abs(differences)),
        points=int(finite.sum()),
        excluded=int((~finite).sum()),
        noise=noise,
        noise_share=share,
    )


def _mean(values: Array) -> float:
    """Mean of the finite values; NaN where there is none."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else math.nan


def _derivatives(f: Array, axis: int, step: float) -> tuple[Array, Array]:
    """First and second derivative along an axis: three points, exact on a quadratic, also at the rim."""
    f = np.moveaxis(f, axis, 0)
    first, second = np.empty_like(f), np.empty_like(f)
    first[1:-1] = (f[2:] - f[:-2]) / (2 * step)
    first[0] = (-3 * f[0] + 4 * f[1] - f[2]) / (2 * step)
    first[-1] = (3 * f[-1] - 4 * f[-2] + f[-3]) / (2 * step)
    second[1:-1] = (f[2:] - 2 * f[1:-1] + f[:-2]) / step**2
    second[0], second[-1] = second[1], second[-2]
    return np.moveaxis(first, 0, axis), np.moveaxis(second, 0, axis)


def _noise(f: Array) -> tuple[float | None, float | None]:
    """Noise of one point from fourth differences, and its share of the second differences.

    Independent noise of standard deviation σ gives differences of order k the variance C(2k, k)·σ², while those
    of a smooth function fall off with the order (the difference table of Moré and Wild, 2011).
    """
    if min(f.shape) < 5:
        return None, None
    second = _root_mean_square(np.diff(f, 2, axis=0), np.diff(f, 2, axis=1))
    fourth = _root_mean_square(np.diff(f, 4, axis=0), np.diff(f, 4, axis=1))
    if not (math.isfinite(second) and math.isfinite(fourth)):
        return None, None
    sigma = fourth / math.sqrt(70)
    return sigma, min(1.0, math.sqrt(6) * sigma / second) if second > 0 else 1.0


def _root_mean_square(*parts: Array) -> float:
    return math.sqrt(_mean(np.concatenate([part.ravel() for part in parts]) ** 2))


def warnings_of(grid: npt.ArrayLike, found: Flatness, unit_roundoff: float) -> list[str]:
    """What a reader must know before using these numbers: excluded points, and rounding noise.

    ``unit_roundoff``: spacing of the compute type at 1 (1.2e-7 for float32, 7.8e-3 for bfloat16).
    """
    f = np.asarray(grid, dtype=np.float64)
    notes: list[str] = []
    if found.excluded:
        notes.append(
            f"{found.excluded} of {f.size} grid points are not finite (drawn grey); "
            "they and the differences that touch them are left out of SC, AG and MAG"
        )
    kept = f[np.isfinite(f)]
    if not kept.size:
        return [*notes, "no grid point is finite: the range is far too large"]
    spread, level = float(kept.max() - kept.min()), float(np.abs(kept).max())
    noise_share: Any = found.noise_share
    if level > 0 and spread <= 8 * unit_roundoff * level:
        notes.append(_too_small(spread))
    elif noise_share is not None and noise_share > 0.3:
        if spread <= 1000 * unit_roundoff * level:
            notes.append(_too_small(spread))
        else:
            notes.append(
                "neighbouring points differ like independent noise although the surface is not flat: "
                "the grid is too coarse for this range; use more points or a smaller range"
            )
    return notes


def _too_small(spread: float) -> str:
    return (
        f"the losses differ by {spread:.1e} at most, which is rounding noise: "
        "the range is too small for SC, AG and MAG to mean anything; increase it"
    )
