"""A scanned loss surface: the grid, its axes, where it came from, and what to know before using it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import UserError
from holdfast.files import write_json
from holdfast.landscape.flat import Flatness, flatness, warnings_of

Array = npt.NDArray[np.float64]
FORMAT = "holdfast-surface-1"


@dataclass(frozen=True)
class Mark:
    """A named point or path on the plane, for example the checkpoints of a training: (α, β) pairs."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Surface:
    """Losses on a grid: ``grid[i, j]`` = L(θ + alphas[i]·δ₁ + betas[j]·δ₂), in nats per supervised token.

    ``centre`` is the loss at θ itself (the evaluation loss, exactly). ``meta`` says how the surface was made:
    directions and their norms, seed, subset, number of supervised tokens, compute type, plan, seconds.
    """

    grid: Array
    alphas: Array
    betas: Array
    centre: float
    meta: dict[str, Any] = field(default_factory=dict)
    marks: tuple[Mark, ...] = ()

    @property
    def spacing(self) -> tuple[float, float]:
        """Distance of neighbouring grid points along α and along β."""
        return _step(self.alphas), _step(self.betas)

    def flatness(self) -> Flatness:
        """SC, AG and MAG of this one plane; several planes: ``summarize``."""
        return flatness(self.grid, self.spacing)

    def notes(self) -> list[str]:
        """Warnings that belong beside every number taken from this surface; empty if there are none."""
        roundoff = 2.0**-7 if self.meta.get("compute") == "bfloat16" else 2.0**-23
        if self.meta.get("compute") == "float16":
            roundoff = 2.0**-10
        elif self.meta.get("compute") == "float64":
            roundoff = 2.0**-52
        return [*self.meta.get("warnings", []), *warnings_of(self.grid, self.flatness(), roundoff)]

    def marked(self, label: str, *points: tuple[float, float]) -> Surface:
        """The same surface with a named point or path drawn on it."""
        mark = Mark(label, tuple((float(a), float(b)) for a, b in points))
        return replace(self, marks=(*self.marks, mark))

    def save(self, path: str | Path) -> Path:
        """Write the surface as ``.json`` (text) or ``.npz`` (arrays, no pickle); both round-trip exactly."""
        path = Path(path)
        if path.suffix == ".json":
            write_json(path, self._as_dict())
        elif path.suffix == ".npz":
            path.parent.mkdir(parents=True, exist_ok=True)
            rest = {key: value for key, value in self._as_dict().items() if key not in ("grid", "alphas", "betas")}
            np.savez(path, grid=self.grid, alphas=self.alphas, betas=self.betas, rest=np.array(json.dumps(rest)))
        else:
            raise UserError(f"{path}: a surface is saved as .json or .npz, not '{path.suffix}'")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Surface:
        """Read a surface that ``save`` wrote. Raises UserError if the file is not one."""
        path = Path(path)
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    content = json.loads(str(file["rest"]))
                    content |= {key: file[key] for key in ("grid", "alphas", "betas")}
            else:
                content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise KeyError("format")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a surface written by holdfast") from error
        return cls(
            grid=_floats(content["grid"]),
            alphas=_floats(content["alphas"]),
            betas=_floats(content["betas"]),
            centre=float(content["centre"]),
            meta=content["meta"],
            marks=tuple(Mark(m["label"], tuple((a, b) for a, b in m["points"])) for m in content["marks"]),
        )

    def _as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "centre": self.centre if math.isfinite(self.centre) else str(self.centre),
            "alphas": self.alphas.tolist(),
            "betas": self.betas.tolist(),
            # JSON has no NaN or infinity: they travel as words, and float() reads them back
            "grid": [[x if math.isfinite(x) else str(x) for x in row] for row in self.grid.tolist()],
            "marks": [{"label": mark.label, "points": [list(p) for p in mark.points]} for mark in self.marks],
            "meta": self.meta,
        }


def _step(axis: Array) -> float:
    return float((axis[-1] - axis[0]) / (len(axis) - 1))


def _floats(values: Any) -> Array:
    if isinstance(values, np.ndarray):
        return values.astype(np.float64)
    return np.array([[float(x) for x in v] if isinstance(v, list) else float(v) for v in values], dtype=np.float64)
