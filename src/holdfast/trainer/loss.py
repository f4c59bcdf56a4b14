"""The loss seam inside a Trainer: what a method of that seam needs to know of a micro-batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from holdfast.errors import UserError
from holdfast.method import Batch, Method, compose_loss, with_seam
from holdfast.probe import evaluating, forward_logits, supervised
from holdfast.unsupported import is_sft


class LossSeam(Trainer):
    """Puts the methods that edit the loss around the Trainer's ``compute_loss``."""

    methods: list[Method]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss seam, in training only; evaluation losses stay the Trainer's own."""
        assert self.model is not None
        if return_outputs or not self.model.training or not self.is_in_train or not with_seam(self.methods, "loss"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            names = ", ".join(method.name for method in with_seam(self.methods, "loss"))
            raise UserError(f"{names}: batches need 'labels'; they have {', '.join(inputs)}.")
        batch = Batch(
            inputs,
            self._token_weight(inputs, num_items_in_batch),
            functools.partial(self._teacher_logits, inputs),
        )

        def innermost(batch: Batch) -> Tensor:
            if not batch.want_logits:
                return cast(Tensor, super(LossSeam, self).compute_loss(model, inputs, False, num_items_in_batch))
            loss, batch.logits = self._loss_and_logits(model, inputs, num_items_in_batch)
            return loss

        return compose_loss(self.methods, innermost)(batch)

    def _teacher_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        assert self.model is not None
        with evaluating(self.model), torch.no_grad():
            return supervised(forward_logits(self.model, inputs), inputs["labels"], self._shifts())[0]

    def _loss_and_logits(self, model: Any, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Tensor]:
        """The Trainer's loss and the logits at supervised positions, from one forward pass.

        TRL's own loss never makes the logits; there the model's loss is used, which is the same number.
        """
        labels = inputs["labels"]
        plain: Any = Trainer if is_sft(self) else super()
        given = (self, model) if is_sft(self) else (model,)
        loss, outputs = plain.compute_loss(*given, inputs, return_outputs=True, num_items_in_batch=num_items)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        return loss, supervised(logits, labels, self._shifts())[0]

    def _shifts(self) -> bool:
        """Whether labels are shifted inside the loss (causal language models)."""
        return bool(getattr(self, "_loss_shifts_labels", True))

    def _token_weight(self, inputs: Mapping[str, Any], num_items: Any) -> Any:
        """What a sum over supervised tokens is to be multiplied by, to be weighted as the Trainer's loss is."""
        if num_items is None or not (self.model_accepts_loss_kwargs or is_sft(self)):
            labels = inputs["labels"]
            shifted = labels[:, 1:] if self._shifts() and labels.dim() == 2 else labels
            return 1.0 / max(1, int((shifted != -100).sum()))
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return ranks / num_items
