"""Averages of weights: SFA and EMA during training, WiSE-FT at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.anchor import Anchor, Snapshot
from holdfast.method import Context, Method
from holdfast.tensors import Params, copies, local, pull, restore


@dataclass
class SFA(Method):
    """Sequential fine-tuning averaging: pull the weights back to θ₀ every round(p·T) steps, and at T.

    θ ← β·θ₀ + (1−β)·θ   (arXiv 2501.05559, Algorithm 1; at T also when T is no multiple of the interval)

    - ``anchor``: θ₀ is the start of the ``task``, the ``base`` (start of the stream of tasks), a checkpoint folder, or
      ``rolling``: the last average. ``rolling`` is Lookahead: it shrinks steps and pulls to nothing in particular.
    - ``moments``: what an average does to Adam's moments (or SGD's momentum): ``keep`` them, ``scale`` the first by
      1−β and keep the second, or ``reset`` both (and Adam's step count).
    - ``mode``: ``periodic``, or ``continuous``: a pull of 1−(1−β)^(1/k) at every step, k the interval. The moments are
      kept then.

    Cost: no gradient; a read of θ₀ per average. θ₀ is streamed from its folder if it has one, else one (sharded) copy
    of the trainable weights stays in memory. With LoRA the adapter's own matrices A and B are averaged, not their
    product. β=0 does nothing, p=1 is WiSE-FT.
    """

    p: float = 0.25
    beta: float = 0.5
    anchor: str = "task"
    moments: Literal["keep", "scale", "reset"] = "keep"
    mode: Literal["periodic", "continuous"] = "periodic"

    name: ClassVar[str] = "sfa"
    symbols: ClassVar[Mapping[str, str]] = {"p": "p", "beta": "β"}

    def __post_init__(self) -> None:
        self.require(0 < self.p <= 1, "p", "in (0, 1]")
        self.require(0 <= self.beta <= 1, "beta", "in [0, 1]")
        self.require(bool(self.anchor), "anchor", "'task', 'base', 'rolling' or a checkpoint folder")
        self.require(self.moments in ("keep", "scale", "reset"), "moments", "'keep', 'scale' or 'reset'")
        self.require(self.mode in ("periodic", "continuous"), "mode", "'periodic' or 'continuous'")
        continuous = self.mode == "continuous"
        self.require(not continuous or self.anchor != "rolling", "anchor", "fixed (not 'rolling') with mode=continuous")
        self.require(not continuous or self.moments == "keep", "moments", "'keep' with mode=continuous")
        self._anchor: Anchor | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def begin(self, context: Context) -> None:
        self._optimizer = context.optimizer
        if self.anchor == "rolling":
            self._anchor = Snapshot(context.params)
        else:
            self._anchor = context.anchor(self.anchor, "device" if self.mode == "continuous" else "disk")

    def interval(self, total: int) -> int:
        """Steps between averages."""
        return max(1, round(self.p * total))

    def weights(self, params: Params, step: int, total: int) -> None:
        interval = self.interval(total)
        if self.mode == "continuous":
            self._pull(params, 1 - (1 - self.beta) ** (1 / interval))
        elif step % interval == 0 or step == total:
            self._pull(params, self.beta)
            self._treat_moments(params)
            if self.anchor == "rolling":
                self._anchor = Snapshot(params)

    def _pull(self, params: Params, weight: float) -> None:
        if weight == 0:
            return
        assert self._anchor is not None, "begin() was not called"
        for name, param in params.items():
            pull(param, self._anchor.local(name, param), weight)

    @torch.no_grad()
    def _treat_moments(self, params: Params) -> None:
        if self.moments == "keep" or self.beta == 0 or self._optimizer is None:
            return
        for param in params.values():
            for key, value in self._optimizer.state.get(param, {}).items():
                if not isinstance(value, Tensor):
                    continue
                if self.moments == "reset":
                    local(value).zero_()
                elif key in ("exp_avg", "momentum_buffer"):
                    local(value).mul_(1 - self.beta)

    def state_dict(self) -> dict[str, Any]:
        if self.anchor == "rolling" and isinstance(self._anchor, Snapshot):
            return {f"anchor/{name}": value for name, value in self._anchor.tensors().items()}
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.anchor == "rolling":
            kept = {key.removeprefix("anchor/"): value for key, value in state.items() if key.startswith("anchor/")}
            self._anchor = Snapshot.of(kept)


@dataclass
class EMA(Method):
    """Exponential moving average of the weights of every step; the average replaces the weights at the task's end.

    a ← decay·a + (1−decay)·θ after each step, from a = θ₀; θ ← a at T   (Polyak-style averaging)

    The average is not corrected for its start at θ₀: with few steps it stays near θ₀, like a pull to the anchor.
    Evaluations and checkpoints before T see the raw weights. Cost: no gradient; one (sharded) copy of the trainable
    weights. With LoRA the adapter's own matrices A and B are averaged, not their product.
    """

    decay: float = 0.99

    name: ClassVar[str] = "ema"
    symbols: ClassVar[Mapping[str, str]] = {"decay": "decay"}

    def __post_init__(self) -> None:
        self.require(0 <= self.decay < 1, "decay", "in [0, 1)")
        self._average: dict[str, Tensor] = {}

    def begin(self, context: Context) -> None:
        self._average = dict(zip(context.params, copies(context.params.values()), strict=True))

    @torch.no_grad()
    def weights(self, params: Params, step: int, total: int) -> None:
        for name, param in params.items():
            average, weight = self._average[name], local(param)
            average.mul_(self.decay).add_(weight, alpha=1 - self.decay)
        if step == total:
            restore(params.values(), [self._average[name] for name in params])

    def state_dict(self) -> dict[str, Any]:
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, average in self._average.items():
            average.copy_(state[name])


@dataclass
class WiSEFT(Method):
    """Weight-space ensemble of the start and the end of a task.

    θ ← (1−α)·θ₀ + α·θ   (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3)

    Cost: no training at all; one pass over two checkpoints. Inside a Trainer without an anchor folder, one copy of the
    trainable weights. With LoRA the adapter's own matrices A and B are averaged, not their product.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "wiseft"
    symbols: ClassVar[Mapping[str, str]] = {"alpha": "α"}

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha <= 1, "alpha", "in [0, 1]")

    def checkpoint(self, tuned: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Mixed(tuned, anchor, lambda name, end, start: end * self.alpha + start * (1 - self.alpha))


class Mixed(Mapping[str, Tensor]):
    """A state dict whose tensors are a function of (name, tuned, anchor), computed when asked for.

    Tensors that are not floating point, or that the anchor lacks, are kept as tuned. Low precision is mixed in fp32.
    """

    def __init__(self, tuned: Mapping[str, Tensor], anchor: Mapping[str, Tensor], mix: Any) -> None:
        self._tuned, self._anchor, self._mix = tuned, anchor, mix

    def __getitem__(self, name: str) -> Tensor:
        tuned = self._tuned[name]
        if not tuned.is_floating_point() or name not in self._anchor:
            return tuned
        wide = torch.promote_types(tuned.dtype, torch.float32)
        mixed: Tensor = self._mix(name, tuned.to(wide), self._anchor[name].to(device=tuned.device, dtype=wide))
        return mixed.to(tuned.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tuned)

    def __len__(self) -> int:
        return len(self._tuned)
