"""Planes through checkpoints: three models on one plane, or the two main directions of a training (PCA)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import UserError, did_you_mean
from holdfast.landscape.directions import Stored
from holdfast.landscape.grid import Mark
from holdfast.landscape.weights import Cell, Mover, Scope, is_sharded, moving

Source = str | Path | Mapping[str, Tensor]
MARGIN = 0.2  # of the marks' extent, added around them


@dataclass(frozen=True, eq=False)
class Plane:
    """Two orthonormal directions at a model's own weights, which are the origin; coordinates are L2 distances.

    ``marks``: where the checkpoints lie on the plane. ``explained``: for PCA, the share of the checkpoints'
    squared distance from the origin that each direction holds. Memory: 2 copies of the moved weights.
    """

    directions: tuple[Stored, Stored]
    marks: tuple[Mark, ...]
    kind: str
    scope: Scope
    explained: tuple[float, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def extent(self) -> tuple[float, float, float, float]:
        """α from, α to, β from, β to: all marks with a margin."""
        points = np.array([point for mark in self.marks for point in mark.points] + [(0.0, 0.0)])
        low, high = points.min(axis=0), points.max(axis=0)
        pad = MARGIN * np.maximum(high - low, 1e-12 + (high - low).max())
        low, high = low - pad, high + pad
        return float(low[0]), float(high[0]), float(low[1]), float(high[1])

    def with_path(self, label: str, points: Sequence[tuple[float, float]]) -> Plane:
        """The same plane with another named point or path, for example from ``project``."""
        return replace(self, marks=(*self.marks, Mark(label, tuple(points))))


class Checkpoint:
    """Tensors by parameter name, read one at a time: a mapping, or a folder of safetensors files."""

    def __init__(self, source: Source) -> None:
        self.label = "given tensors" if isinstance(source, Mapping) else Path(source).name
        self._tensors = source if isinstance(source, Mapping) else {}
        self._files = {} if isinstance(source, Mapping) else _index(Path(source))

    def names(self) -> list[str]:
        """The names of the tensors that are there."""
        return [*self._tensors, *self._files]

    def part(self, cell: Cell) -> Tensor:
        """This rank's part of a parameter, flat, in the type of the sums. Raises UserError if it doesn't fit."""
        whole = self._read(cell.name)
        if whole.shape != cell.shape:
            raise UserError(
                f"{self.label}: '{cell.name}' has shape {tuple(whole.shape)}, the model's {tuple(cell.shape)}"
            )
        local = whole.reshape(-1)[cell.start : cell.start + cell.view.numel()]
        return local.to(device=cell.view.device, dtype=cell.work_dtype)

    def _read(self, name: str) -> Tensor:
        for candidate in (name, name.replace(".default.", ".")):  # PEFT writes adapters without their name
            if candidate in self._tensors:
                return self._tensors[candidate].detach()
            if candidate in self._files:
                from safetensors import safe_open

                with safe_open(self._files[candidate], "pt") as file:
                    return file.get_tensor(candidate)
        raise UserError(f"{self.label} has no tensor '{name}'.{did_you_mean(name, self.names()[:2000])}")


def _index(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a folder holds which tensor."""
    from safetensors import safe_open

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a checkpoint")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise UserError(f"{folder} has no safetensors files")
    return found


def plane(model: nn.Module, first: Source, second: Source, *, scope: Scope = "trainable",
          labels: tuple[str, str, str] = ("base", "A", "B")) -> Plane:  # fmt: skip
    """The plane through the model's weights θ and two checkpoints, as in Garipov et al. (1802.10026, 4).

    δ₁ = (A − θ)/‖A − θ‖; δ₂ = the part of B − θ orthogonal to δ₁, over its norm. θ, A and B lie on the plane
    exactly, so losses on several tasks compare all three on one picture. Memory: 2 copies of the moved weights.
    Raises UserError if a checkpoint doesn't fit the model, or the three lie on one line.
    """
    given = [Checkpoint(first), Checkpoint(second)]
    with moving(model, scope) as mover, torch.no_grad():
        gram = _gram(mover, given)
        if gram[0, 0] <= 0 or gram[1, 1] - gram[0, 1] ** 2 / gram[0, 0] <= 1e-10 * gram[1, 1]:
            raise UserError("the three checkpoints lie on one line: use landscape.line between two of them")
        norm = float(np.sqrt(gram[0, 0]))
        along = float(gram[0, 1] / norm)
        off = float(np.sqrt(gram[1, 1] - along**2))
        mix = np.array([[1 / norm, 0.0], [-along / (norm * off), 1 / off]])
        made = _mixed(mover, given, mix)
    marks = (Mark(labels[0], ((0.0, 0.0),)), Mark(labels[1], ((norm, 0.0),)), Mark(labels[2], ((along, off),)))
    return Plane(made, marks, "plane", scope)


def pca(model: nn.Module, checkpoints: Sequence[Source], *, scope: Scope = "trainable",
        label: str = "training") -> Plane:  # fmt: skip
    """The two main directions of a training: PCA of θᵢ − θ over its checkpoints (1712.09913, 7.2), not centred.

    θ, the model's own weights, is normally the last checkpoint. The checkpoints' path is drawn on the plane,
    projected; ``explained`` says how much of it the plane holds. Memory: 2 copies of the moved weights and, while
    it is computed, one tensor of every checkpoint. Raises UserError for fewer than two different checkpoints.
    """
    given = [Checkpoint(source) for source in checkpoints]
    if len(given) < 2:
        raise UserError("PCA of a training needs at least two checkpoints besides the model")
    with moving(model, scope) as mover, torch.no_grad():
        gram = _gram(mover, given)
        values, vectors = np.linalg.eigh(gram)
        values, vectors = values[::-1], vectors[:, ::-1]
        if values[1] <= 1e-10 * values[0] or values[0] <= 0:
            raise UserError("the checkpoints lie on one line with the model: there is no plane to draw")
        mix = (vectors[:, :2] / np.sqrt(values[:2])).T
        made = _mixed(mover, given, mix)
    path = tuple((float(a), float(b)) for a, b in gram @ mix.T)
    explained = tuple(float(value) for value in values[:2] / values.clip(min=0).sum())
    marks = (Mark(label, (*path, (0.0, 0.0))), Mark("θ", ((0.0, 0.0),)))
    return Plane(made, marks, "pca", scope, explained)


def project(model: nn.Module, onto: Plane, checkpoint: Source) -> tuple[float, float, float]:
    """(α, β, distance from the plane) of a checkpoint; the model must hold the plane's origin."""
    given = Checkpoint(checkpoint)
    with moving(model, onto.scope) as mover, torch.no_grad():

        def rows(cell: Cell, home: Tensor) -> list[Tensor]:  # fmt: skip
            return [given.part(cell) - home.to(cell.work_dtype), *(d.parts[cell.name] for d in onto.directions)]

        gram = _summed(mover, rows)
    alpha, beta = float(gram[0, 1]), float(gram[0, 2])
    return alpha, beta, float(np.sqrt(max(0.0, gram[0, 0] - alpha**2 - beta**2)))


def _gram(mover: Mover, given: Sequence[Checkpoint]) -> np.ndarray:
    """Inner products of the differences θᵢ − θ, in float64, over all ranks."""
    return _summed(mover, lambda cell, home: [point.part(cell) - home.to(cell.work_dtype) for point in given])


def _summed(mover: Mover, rows: Callable[[Cell, Tensor], list[Tensor]]) -> np.ndarray:
    total: Tensor | None = None
    parameters = dict(mover.model.named_parameters())
    sharded = False
    for cell, home in zip(mover.cells, mover.home, strict=True):
        stacked = torch.stack(rows(cell, home)).double()
        product = stacked @ stacked.T
        if is_sharded(parameters[cell.name]):
            sharded = True
        total = product if total is None else total + product
    assert total is not None
    if sharded:
        dist.all_reduce(total)
    return total.cpu().numpy()


def _mixed(mover: Mover, given: Sequence[Checkpoint], mix: np.ndarray) -> tuple[Stored, Stored]:
    """Two directions Σ mixₖᵢ (θᵢ − θ), one tensor at a time."""
    made = (Stored({}), Stored({}))
    for cell, home in zip(mover.cells, mover.home, strict=True):
        differences = torch.stack([point.part(cell) - home.to(cell.work_dtype) for point in given])
        for direction, weights in zip(made, mix, strict=True):
            # float64 sums: orthogonality of the two then holds to the directions' own precision
            exact = torch.tensor(weights, dtype=torch.float64, device=differences.device) @ differences.double()
            direction.parts[cell.name] = exact.to(cell.work_dtype)
    return made
