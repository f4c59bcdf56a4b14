"""Penalties on the distance to θ₀, as gradient terms: elementwise on the local shard, no autograd graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.anchor import Anchor, Snapshot
from holdfast.method import Context, Grad, Method
from holdfast.tensors import Params, local


@dataclass
class L2(Method):
    """Penalty λ/2·‖θ−θ₀‖² on the distance to the anchor.

    g ← g + λ·(θ−θ₀)   (arXiv 2501.05559, eq. 1-2)
    """

    weight: float = 0.1

    name: ClassVar[str] = "l2"
    symbols: ClassVar[Mapping[str, str]] = {"weight": "λ"}

    def __post_init__(self) -> None:
        self.require(self.weight >= 0, "weight", "at least 0")
        self._anchor: Anchor | None = None

    def begin(self, context: Context) -> None:
        self._anchor = context.anchor("task")

    def gradient(self, grad: Grad, params: Params) -> Grad:
        anchor = self._anchor or Snapshot(params)

        def penalised() -> Tensor | None:
            loss = grad()
            if self.weight:
                self._add(params, anchor)
            return loss

        return penalised

    @torch.no_grad()
    def _add(self, params: Params, anchor: Anchor) -> None:
        for name, param in params.items():
            if param.grad is not None:
                difference = local(param) - anchor.local(name, param)
                local(param.grad).add_(difference, alpha=self.weight)
