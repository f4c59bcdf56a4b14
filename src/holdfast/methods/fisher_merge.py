"""Fisher-weighted WiSE-FT: each weight goes to the model that knows it better."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.method import Context, Method
from holdfast.methods import fisher as information
from holdfast.methods.averaging import Mixed
from holdfast.tensors import Params, norm


@dataclass
class FisherMerge(Method):
    """Merge the start and the end of a task, weighted by their diagonal Fisher information.

    θ ← (λ₀F₀θ₀ + λFθ)/(λ₀F₀ + λF)   (Matena and Raffel 2022; arXiv 2501.05559, eq. 15)

    F₀: past tasks' data at θ₀; F: the task's data at θ. Where both are 0 the weights are mixed as λ₀ : λ. ``normalize``
    divides both by their Euclidean norm over all weights: F vanishes as a task is learned to the end, and would have no
    say. ``fisher``, ``samples``, ``batch`` and ``decay`` are those of :class:`holdfast.methods.penalty.EWC`. Needs past
    tasks' data.
    Cost: ``samples`` passes per past task before the first step and for the task after the last; up to three (sharded)
    copies of the trainable weights (θ₀, F₀, F).
    """

    weight: float = 1.0
    anchor_weight: float = 1.0
    fisher: information.Kind = "empirical"
    samples: int = 256
    batch: int = 8
    decay: float = 1.0
    normalize: bool = False

    name: ClassVar[str] = "fisher_merge"
    needs_past: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {"weight": "λ", "anchor_weight": "λ₀"}

    def __post_init__(self) -> None:
        self.require(self.weight >= 0, "weight", "at least 0")
        self.require(self.anchor_weight >= 0, "anchor_weight", "at least 0")
        self.require(self.weight + self.anchor_weight > 0, "weight", "above 0 where anchor_weight is 0")
        self.require(self.fisher in information.KINDS, "fisher", "'empirical', 'true' or 'batch'")
        self.require(self.samples >= 1, "samples", "at least 1")
        self.require(self.batch >= 1, "batch", "at least 1")
        self.require(0 < self.decay <= 1, "decay", "in (0, 1]")
        self._context = Context({})
        self.at_anchor: dict[str, Tensor] = {}
        self.at_end: dict[str, Tensor] = {}

    def begin(self, context: Context) -> None:
        self._context, self.at_anchor, self.at_end = context, {}, {}
        if self.anchor_weight and not context.resuming:
            given = (self.fisher, self.samples, self.batch, context.seed, self.decay, self.name)
            self.at_anchor = information.of_past(context.params, context.probe, *given)

    def weights(self, params: Params, step: int, total: int) -> None:
        if step == total and self.anchor_weight:
            assert self._context.probe is not None
            given = (self.fisher, self.samples, self.batch, self._context.seed)
            with torch.enable_grad():
                self.at_end = information.diagonal(params, self._context.probe, None, *given)

    def checkpoint(self, tuned: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.anchor_weight:
            return tuned
        factors = self.weight / self._size(self.at_end), self.anchor_weight / self._size(self.at_anchor)
        return Mixed(tuned, anchor, functools.partial(self._mix, *factors))

    def _size(self, fisher: Mapping[str, Tensor]) -> float:
        """What F is divided by: its norm over all weights and ranks, or 1."""
        if not self.normalize:
            return 1.0
        names = sorted(fisher)  # a resumed run may hold them in another order, and sums depend on it
        like = [self._context.params.get(name, fisher[name]) for name in names]
        return float(norm([fisher[name] for name in names], like)) or 1.0

    def _mix(self, factor: float, anchor_factor: float, name: str, end: Tensor, start: Tensor) -> Tensor:
        ours = factor * self.at_end[name].to(end)
        theirs = anchor_factor * self.at_anchor[name].to(end)
        share = torch.where(ours + theirs > 0, ours / (ours + theirs), self.weight / (self.weight + self.anchor_weight))
        return share * end + (1 - share) * start

    def state_dict(self) -> dict[str, Any]:
        start = {f"anchor/{name}": value for name, value in self.at_anchor.items()}
        return start | {f"end/{name}": value for name, value in self.at_end.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for prefix, target in (("anchor/", self.at_anchor), ("end/", self.at_end)):
            target.update({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
