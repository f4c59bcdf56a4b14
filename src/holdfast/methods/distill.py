"""Distillation to the anchor: keep saying what the model said before the task."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.anchor import Anchor
from holdfast.method import Batch, Context, Keep, LossFn, Method
from holdfast.tensors import copies, make_editable, restore


@dataclass
class Distill(Method):
    """Add the divergence from the anchor's predictions on the task's own inputs to the loss.

    L ← L + λ·τ²·mean over supervised tokens of KL(softmax(z₀/τ) ‖ softmax(z/τ))
    (Li and Hoiem 2016, "Learning without forgetting"; Hinton et al. 2015 for τ)

    z₀ are the logits of θ₀ on the same inputs, in evaluation mode; the mean is over the whole window. Cost: one forward
    pass of θ₀ per gradient, and one (sharded) copy of the trainable weights, swapped in for it, plus one transient.
    With LoRA only the adapter is swapped. In TRL the loss is computed from full logits then.
    """

    weight: float = 1.0
    temperature: float = 2.0
    anchor: str = "task"
    keep: Keep = "device"

    name: ClassVar[str] = "distill"
    symbols: ClassVar[Mapping[str, str]] = {"weight": "λ", "temperature": "τ"}

    def __post_init__(self) -> None:
        self.require(self.weight >= 0, "weight", "at least 0")
        self.require(self.temperature > 0, "temperature", "above 0")
        self.require(self.keep in ("device", "cpu", "disk"), "keep", "'device', 'cpu' or 'disk'")
        self._context = Context({})
        self._anchor: Anchor | None = None

    def begin(self, context: Context) -> None:
        self._context = context
        self._anchor = context.anchor(self.anchor, self.keep)

    def loss(self, loss_fn: LossFn) -> LossFn:
        return functools.partial(self._distilled, loss_fn) if self.weight else loss_fn

    def _distilled(self, loss_fn: LossFn, batch: Batch) -> Tensor:
        with self._anchored(), torch.no_grad():
            teacher = batch.forward()
        batch.want_logits = True
        loss = loss_fn(batch)
        assert batch.logits is not None
        divergence = kl(teacher, batch.logits, self.temperature)
        return loss + self.weight * self.temperature**2 * batch.weight * divergence

    @contextlib.contextmanager
    def _anchored(self) -> Iterator[None]:
        """The model at θ₀ inside; its weights back afterwards, bit for bit."""
        assert self._anchor is not None, "begin() was not called"
        params = self._context.params
        saved = copies(params.values())
        make_editable(self._context.model)
        restore(params.values(), [self._anchor.local(name, param) for name, param in params.items()])
        try:
            yield
        finally:
            make_editable(self._context.model)
            restore(params.values(), saved)


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Sum over rows of KL(softmax(teacher/τ) ‖ softmax(student/τ)), in nats; logits (n, classes)."""
    wide = torch.promote_types(student.dtype, torch.float32)
    p = torch.log_softmax(teacher.to(wide) / temperature, -1)
    q = torch.log_softmax(student.to(wide) / temperature, -1)
    return (p.exp() * (p - q)).sum()
