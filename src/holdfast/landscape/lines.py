"""One-dimensional scans between two checkpoints: loss barriers and linear mode connectivity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from holdfast.errors import UserError
from holdfast.landscape.checkpoints import Checkpoint, Source
from holdfast.landscape.grid import Array
from holdfast.landscape.objective import Data, objective_of
from holdfast.landscape.ranks import Ranks, Split
from holdfast.landscape.weights import Mover, Scope, moving, reshard


@dataclass(frozen=True)
class Line:
    """Losses L((1 − t)·A + t·B) at positions ``t``; t = 0 is A and t = 1 is B, exactly."""

    t: Array
    losses: Array
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def barrier(self) -> float:
        """Highest rise over the straight chord: max over t in [0, 1] of L(t) − ((1 − t)·L(0) + t·L(1)).

        Never below 0 (2110.06296, definition 2; in nats per token). NaN points count as infinitely high.
        """
        inside = (self.t >= 0) & (self.t <= 1)
        t, losses = self.t[inside], self.losses[inside]
        rise = losses - ((1 - t) * losses[0] + t * losses[-1])
        return math.inf if not np.isfinite(rise).all() else max(0.0, float(rise.max()))

    def connected(self, tolerance: float = 0.02) -> bool:
        """Linear mode connectivity: barrier at most ``tolerance`` times the mean loss of the two ends."""
        ends = self.losses[[int(np.abs(self.t - end).argmin()) for end in (0.0, 1.0)]]
        return self.barrier <= tolerance * float(ends.mean())


def line(
    model: nn.Module,
    data: Data,
    start: Source | None,
    end: Source,
    *,
    tokenizer: Any = None,
    points: int = 21,
    beyond: float = 0.0,
    scope: Scope = "trainable",
    compute: str = "float32",
    split: Split = "auto",
    **subset: Any,
) -> Line:
    """Scan the straight line from ``start`` to ``end`` (checkpoint folders or mappings; None: the model itself).

    ``beyond`` extends the line by that share of its length at both ends. The model lends its architecture and its
    weights that aren't moved; its own weights are put back bit for bit. Cost: ``points`` forwards over the subset,
    2 extra copies of the weights at most, checkpoints read a tensor at a time.
    Raises UserError for fewer than 3 points or a checkpoint that doesn't fit the model.
    """
    if points < 3 or beyond < 0:
        raise UserError(f"a line needs at least 3 points and beyond >= 0, not {points} and {beyond}")
    objective = objective_of(data, tokenizer, compute=compute, **subset)
    inner = np.linspace(0.0, 1.0, points)
    outer = np.linspace(0.0, beyond, 1 + max(1, round(beyond * (points - 1))))[1:] if beyond else np.array([])
    positions = np.concatenate([-outer[::-1], inner, 1 + outer])
    first = Checkpoint(start) if start is not None else None
    with moving(model, scope) as mover, torch.no_grad():
        ranks = Ranks.of(mover.model, split)
        losses: dict[int, float] = {}
        for index in ranks.points(list(range(len(positions)))):
            _interpolate(mover, first, Checkpoint(end), float(positions[index]))
            losses[index] = ranks.loss(objective, mover.model)
        losses = ranks.union(losses)
    found = np.array([losses[i] for i in range(len(positions))], dtype=np.float64)
    return Line(positions, found, {"tokens": getattr(objective, "tokens", None), "scope": scope, "compute": compute})


def _interpolate(mover: Mover, start: Checkpoint | None, end: Checkpoint, t: float) -> None:
    """Weights ← (1 − t)·A + t·B; torch.lerp is exact at both ends."""
    reshard(mover.model)
    mover.at_home = False
    for cell, home in zip(mover.cells, mover.home, strict=True):
        first = home.to(cell.work_dtype) if start is None else start.part(cell)
        cell.view.copy_(torch.lerp(first, end.part(cell), t))
