"""Likelihoods of single examples, for Fisher information: the host's data, collator and model behind one small door."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from holdfast.window import rng_state, set_rng_state

Module = TypeVar("Module", bound=nn.Module)


class ModelProbe:
    """Examples of past tasks (and of the one being trained) and their log-likelihood under the model's weights.

    The model runs in evaluation mode; random state and modes are put back. Every rank sees the same examples, so that
    under FSDP2, which averages gradients over ranks, the gradient of one example is that example's.
    """

    def __init__(
        self,
        model: nn.Module,
        past: Mapping[str, Any],
        task: Any,
        collate: Callable[[list[Any]], Mapping[str, Tensor]],
        prepare: Callable[[Any], Any],
        shifts: bool,
        device: torch.device,
    ) -> None:
        self._model, self._past, self._task = model, past, task
        self._collate, self._prepare, self._shifts, self._device = collate, prepare, shifts, device
        self._prepared: dict[str | None, Any] = {}

    def tasks(self) -> list[str]:
        return list(self._past)

    def examples(self, task: str | None, count: int, seed: int) -> list[Any]:
        if task not in self._prepared:
            self._prepared[task] = self._prepare(self._task if task is None else self._past[task])
        rows = self._prepared[task]
        return [rows[index] for index in random.Random(seed).sample(range(len(rows)), min(count, len(rows)))]

    def log_likelihood(self, examples: Sequence[Any], labels: str, generator: torch.Generator) -> Tensor:
        batch = {
            key: value.to(self._device) if isinstance(value, Tensor) else value
            for key, value in self._collate(list(examples)).items()
        }
        with evaluating(self._model), same_random_state(self._device):
            logits, targets = supervised(forward_logits(self._model, batch), batch["labels"], self._shifts)
        log_p = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
        if labels == "model":
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).squeeze(-1)
            targets = drawn.to(targets.device)
        return log_p.gather(-1, targets.unsqueeze(-1)).sum()


def forward_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The model's logits for inputs, without letting it compute a loss."""
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    outputs = model(**rest)
    found: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    return found


def supervised(logits: Tensor, labels: Tensor, shifts: bool) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,) at supervised positions; causal models predict the next token."""
    if shifts and logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != -100
    return logits[mask], labels[mask]


def on_device(model: Module) -> Module:
    """The model where it is measured: on the GPU (of this rank) if there is one; the weights are moved, not copied."""
    return model.to("cuda") if torch.cuda.is_available() else model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """The random state after the block is the one before it."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
