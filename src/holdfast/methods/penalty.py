"""Penalties on the distance to θ₀, as gradient terms: elementwise on the local shard, no autograd graph."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.anchor import Anchor, Snapshot
from holdfast.method import Context, Grad, Keep, Method
from holdfast.methods import fisher as information
from holdfast.tensors import Params, local, pieces


class _Penalty(Method):
    """What L2, L1 and EWC share: θ₀, and a term added to each gradient."""

    weight: float
    anchor: str
    keep: Keep

    def __post_init__(self) -> None:
        self.require(self.weight >= 0, "weight", "at least 0")
        self.require(bool(self.anchor), "anchor", "'task', 'base' or a checkpoint folder")
        self.require(self.keep in ("device", "cpu", "disk"), "keep", "'device', 'cpu' or 'disk'")
        self._anchor: Anchor | None = None

    def begin(self, context: Context) -> None:
        self._anchor = context.anchor(self.anchor, self.keep)

    def gradient(self, grad: Grad, params: Params) -> Grad:
        return functools.partial(self._penalised, grad, params, self._anchor or Snapshot(params))

    @torch.no_grad()
    def _penalised(self, grad: Grad, params: Params, anchor: Anchor) -> Tensor | None:
        with torch.enable_grad():
            loss = grad()
        if self.weight:
            for name, param in params.items():
                if param.grad is None:
                    continue
                whole = local(param), anchor.local(name, param), local(param.grad), *self._beside(name, param)
                for theta, start, gradient, *beside in pieces(*whole):
                    gradient.add_(self._term(theta - start, *beside), alpha=self.weight)
        return loss

    def _beside(self, name: str, param: Tensor) -> tuple[Tensor, ...]:
        """Further tensors of the parameter's shape that the term needs."""
        return ()

    def _term(self, difference: Tensor, *beside: Tensor) -> Tensor:
        """The gradient of the penalty, for λ = 1, on a stretch of one parameter; may reuse ``difference``."""
        raise NotImplementedError


@dataclass
class L2(_Penalty):
    """Penalty λ/2·‖θ−θ₀‖² on the distance to the anchor.

    g ← g + λ·(θ−θ₀)   (arXiv 2501.05559, eq. 1-2)

    ``keep``: θ₀ stays on the ``device`` (one sharded copy of the trainable weights), in ``cpu`` memory, or is read
    from its folder at every step (``disk``). With AdamW the term is rescaled like any gradient. Cost: no gradient.
    """

    weight: float = 0.1
    anchor: str = "task"
    keep: Keep = "device"

    name: ClassVar[str] = "l2"
    symbols: ClassVar[Mapping[str, str]] = {"weight": "λ"}

    def _term(self, difference: Tensor, *beside: Tensor) -> Tensor:
        return difference


@dataclass
class L1(_Penalty):
    """Penalty λ·Σ|θ−θ₀| on the distance to the anchor.

    g ← g + λ·sign(θ−θ₀), 0 where θ = θ₀   (arXiv 2501.05559, section 6, names it beside L2)

    Costs as :class:`L2`. It pulls with constant strength, so weights that moved little go back and chatter around θ₀.
    """

    weight: float = 1e-4
    anchor: str = "task"
    keep: Keep = "device"

    name: ClassVar[str] = "l1"
    symbols: ClassVar[Mapping[str, str]] = {"weight": "λ"}

    def _term(self, difference: Tensor, *beside: Tensor) -> Tensor:
        return difference.sign_()


@dataclass
class EWC(_Penalty):
    """Elastic weight consolidation: penalty λ/2·Σ F·(θ−θ₀)², F the diagonal Fisher information of past tasks at θ₀.

    g ← g + λ·F⊙(θ−θ₀)   (Kirkpatrick et al. 2017, eq. 3; arXiv 2501.05559, eq. 12)

    ``fisher``: ``empirical`` (per example, the data's labels), ``true`` (labels sampled from the model) or ``batch``
    (square of a batch gradient: cheap, biased); see :func:`holdfast.methods.fisher.diagonal`. Several past tasks:
    F ← ``decay``·F + F_task, oldest first, each at θ₀ (online EWC, Schwarz et al. 2018, adds each at its own optimum).
    Needs past tasks' data (``memory``). Cost: no gradient per step, two (sharded) copies of the trainable weights (F,
    and θ₀ as in :class:`L2`), and ``samples`` passes per past task before the first step.
    """

    weight: float = 1.0
    fisher: information.Kind = "empirical"
    samples: int = 256
    batch: int = 8
    decay: float = 1.0
    anchor: str = "task"
    keep: Keep = "device"

    name: ClassVar[str] = "ewc"
    needs_past: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {"weight": "λ", "fisher": "F"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.fisher in information.KINDS, "fisher", "'empirical', 'true' or 'batch'")
        self.require(self.samples >= 1, "samples", "at least 1")
        self.require(self.batch >= 1, "batch", "at least 1")
        self.require(0 < self.decay <= 1, "decay", "in (0, 1]")
        self._information: dict[str, Tensor] = {}

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._information = {}
        if self.weight and not context.resuming:
            found = information.of_past(
                context.params,
                context.probe,
                self.fisher,
                self.samples,
                self.batch,
                context.seed,
                self.decay,
                self.name,
            )
            self._information = {name: value.cpu() for name, value in found.items()} if self.keep == "cpu" else found

    def _beside(self, name: str, param: Tensor) -> tuple[Tensor, ...]:
        return (self._information[name].to(local(param).device),)

    def _term(self, difference: Tensor, *beside: Tensor) -> Tensor:
        return difference.mul_(beside[0])

    def state_dict(self) -> dict[str, Any]:
        return dict(self._information)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._information = dict(state)
