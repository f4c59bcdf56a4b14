"""Flatness over several random planes: mean, spread and interval, because one plane is an anecdote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import UserError
from holdfast.landscape.grid import Surface

# two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond, the normal's
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Spread:
    """A number measured on several seeds. ``low`` and ``high``: 95 % interval of the mean (Student's t).

    With one seed there is no interval: both are NaN.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the finite values."""
        kept = self._finite()
        return math.fsum(kept) / len(kept) if kept else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds (n − 1)."""
        kept = self._finite()
        if len(kept) < 2:
            return math.nan
        mean = self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / (len(kept) - 1))

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self._half()

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self._half()

    def _finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]

    def _half(self) -> float:
        n = len(self._finite())
        if n < 2:
            return math.nan
        return (T95[n - 2] if n - 2 < len(T95) else 1.96) * self.deviation / math.sqrt(n)

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.4g} (one plane: no interval)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Summary:
    """SC, AG and MAG over planes, with what must be known before they are used."""

    sc: Spread
    ag: Spread
    mag: Spread
    planes: int
    excluded: int
    notes: tuple[str, ...]


def summarize(planes: Sequence[Surface]) -> Summary:
    """Mean and 95 % interval of SC, AG and MAG over surfaces of the same model with different direction seeds.

    ``excluded`` counts the grid points that aren't finite, over all planes. Raises UserError for no surface, or
    for surfaces of different spacing, which MAG can't compare.
    """
    if not planes:
        raise UserError("summarize needs at least one surface")
    if len({(plane.grid.shape, plane.spacing) for plane in planes}) > 1:
        raise UserError("surfaces of different grids can't be averaged: MAG depends on the spacing")
    found = [plane.flatness() for plane in planes]
    notes = [note for plane in planes for note in plane.notes()]
    if len(planes) == 1:
        notes.append("one random plane is an anecdote: use several direction seeds")
    return Summary(
        sc=Spread(tuple(f.sc for f in found)),
        ag=Spread(tuple(f.ag for f in found)),
        mag=Spread(tuple(f.mag for f in found)),
        planes=len(planes),
        excluded=sum(f.excluded for f in found),
        notes=tuple(dict.fromkeys(notes)),
    )
