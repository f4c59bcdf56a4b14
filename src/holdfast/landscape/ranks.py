"""Sharing a scan over the ranks of a torch.distributed job: whole points, or parts of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from holdfast.errors import UserError
from holdfast.landscape.objective import Objective, mean_loss
from holdfast.landscape.weights import is_sharded

Split = Literal["auto", "points", "data", "none"]


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job, and how the work is shared.

    ``points``: each rank scans its own points, nothing is exchanged until the end. ``data``: every rank is at the
    same point and takes its share of the batches; the only way when weights are sharded, since a forward then
    needs all ranks.
    """

    rank: int
    world: int
    split: Split

    @classmethod
    def of(cls, model: nn.Module, split: Split = "auto") -> Ranks:
        """The current job; one rank if torch.distributed isn't started. Raises UserError for an impossible split."""
        if split not in ("auto", "points", "data", "none"):
            raise UserError(f"split must be auto, points, data or none, not '{split}'")
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(0, 1, "none")
        sharded = any(is_sharded(parameter) for parameter in model.parameters())
        if sharded and split == "points":
            raise UserError("sharded weights need every rank at every point: use split='data'")
        if split in ("auto", "none"):
            split = "data" if sharded else "points"
        return cls(dist.get_rank(), dist.get_world_size(), split)

    def points(self, indices: list[int]) -> list[int]:
        """The points that this rank visits."""
        return indices[self.rank :: self.world] if self.split == "points" else indices

    def loss(self, objective: Objective, model: nn.Module) -> float:
        """The whole mean loss at the current weights, the same number on every rank that takes part."""
        if self.split != "data":
            total, weight = mean_loss(objective, model)
            return total / weight
        if objective.parts == 1:  # nothing to share; sharded weights need every rank in the forward anyway
            total, weight = mean_loss(objective, model)
            return self._first(total / weight)
        # every rank makes the same number of forwards (FSDP gathers weights in each); the surplus isn't counted
        mine = list(range(self.rank, objective.parts, self.world))
        total, weight = mean_loss(objective, model, mine)
        if len(mine) < -(-objective.parts // self.world):
            mean_loss(objective, model, [0])
        values = self._gather((total, weight))
        return sum(value[0] for value in values) / sum(value[1] for value in values)

    def union(self, found: dict[int, float]) -> dict[int, float]:
        """The points of all ranks together."""
        if self.world == 1:
            return found
        return {index: value for part in self._gather(found) for index, value in part.items()}

    def agree(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        return [value] if self.world == 1 else self._gather(value)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def _first(self, value: float) -> float:
        return float(self._gather(value)[0])
