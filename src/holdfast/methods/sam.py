"""Sharpness-aware minimisation: the gradient at the worst point nearby instead of the gradient here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.method import Context, Grad, Method
from holdfast.tensors import Params, copies, gradients, locals_, norm, restore, with_gradient


@dataclass
class SAM(Method):
    """Sharpness-aware minimisation.

    g ← ∇L(θ + ε),  ε = ρ·∇L(θ)/‖∇L(θ)‖₂   (Foret et al. 2021, eq. 2; arXiv 2406.04836, eq. 2)

    The norm runs over all trainable parameters and all ranks, in fp32, of the unclipped gradient of the window.
    Cost: two gradients a step, one transient (sharded) copy of the trainable weights.
    """

    rho: float = 0.05

    name: ClassVar[str] = "sam"
    symbols: ClassVar[Mapping[str, str]] = {"rho": "ρ"}

    def __post_init__(self) -> None:
        self.require(self.rho >= 0, "rho", "at least 0")

    def begin(self, context: Context) -> None:
        self._log = context.log

    def gradient(self, grad: Grad, params: Params) -> Grad:
        def sharp() -> Tensor | None:
            grad()
            moved = with_gradient(params)
            saved = copies(moved)
            try:
                self._perturb(moved)
                return grad()
            finally:
                restore(moved, saved)

        return sharp

    @torch.no_grad()
    def _perturb(self, moved: list[torch.nn.Parameter]) -> None:
        direction = gradients(moved)
        length = norm(direction)
        if self.rho and length > 0:
            parts = locals_(direction)
            torch._foreach_mul_(parts, float(self.rho / length))
            torch._foreach_add_(locals_(moved), parts)
