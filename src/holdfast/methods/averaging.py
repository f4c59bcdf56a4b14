"""Averages of weights: SFA during training, WiSE-FT at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.anchor import Anchor
from holdfast.method import Context, Method
from holdfast.tensors import Params, pull


@dataclass
class SFA(Method):
    """Sequential fine-tuning averaging: pull the weights back to θ₀ every round(p·T) steps, and at T.

    θ ← β·θ₀ + (1−β)·θ   (arXiv 2501.05559, Algorithm 1; at T also when T is no multiple of the interval)
    """

    p: float = 0.25
    beta: float = 0.5

    name: ClassVar[str] = "sfa"
    symbols: ClassVar[Mapping[str, str]] = {"p": "p", "beta": "β"}

    def __post_init__(self) -> None:
        self.require(0 < self.p <= 1, "p", "in (0, 1]")
        self.require(0 <= self.beta <= 1, "beta", "in [0, 1]")
        self._anchor: Anchor | None = None

    def begin(self, context: Context) -> None:
        self._anchor = context.anchor("task", resident=False)

    def interval(self, total: int) -> int:
        """Steps between averages."""
        return max(1, round(self.p * total))

    def weights(self, params: Params, step: int, total: int) -> None:
        if self.beta == 0 or (step % self.interval(total) and step != total):
            return
        assert self._anchor is not None, "begin() was not called"
        for name, param in params.items():
            pull(param, self._anchor.local(name, param), self.beta)


@dataclass
class WiSEFT(Method):
    """Weight-space ensemble of the start and the end of a task.

    θ ← (1−α)·θ₀ + α·θ   (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", eq. 1)
    """

    alpha: float = 0.5

    name: ClassVar[str] = "wiseft"
    symbols: ClassVar[Mapping[str, str]] = {"alpha": "α"}

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha <= 1, "alpha", "in [0, 1]")

    def checkpoint(self, tuned: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _Interpolated(tuned, anchor, self.alpha)


class _Interpolated(Mapping[str, Tensor]):
    """(1−α)·anchor + α·tuned, computed when a tensor is asked for; tensors that the anchor lacks are kept."""

    def __init__(self, tuned: Mapping[str, Tensor], anchor: Mapping[str, Tensor], alpha: float) -> None:
        self._tuned, self._anchor, self._alpha = tuned, anchor, alpha

    def __getitem__(self, name: str) -> Tensor:
        tuned = self._tuned[name]
        if self._alpha == 1 or not tuned.is_floating_point() or name not in self._anchor:
            return tuned
        anchor = self._anchor[name]
        wide = torch.promote_types(tuned.dtype, torch.float32)
        mixed = tuned.to(wide) * self._alpha + anchor.to(device=tuned.device, dtype=wide) * (1 - self._alpha)
        return mixed.to(tuned.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tuned)

    def __len__(self) -> int:
        return len(self._tuned)
