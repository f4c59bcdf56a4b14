"""Diagonal Fisher information, in three kinds that are often confused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.errors import UserError
from holdfast.method import Probe
from holdfast.tensors import Params, local

Kind = Literal["empirical", "true", "batch"]
KINDS = ("empirical", "true", "batch")


def diagonal(
    params: Params, probe: Probe, task: str | None, kind: Kind, samples: int, batch: int, seed: int
) -> dict[str, Tensor]:
    """The Fisher diagonal of log p(labels | inputs) at the current weights, local parts by parameter name.

    - ``empirical``: mean over examples of (∇ log p(y|x))², y the data's labels
    - ``true``: the same with y sampled from the model (token by token, after the data's own prefix)
    - ``batch``: mean over batches of (∇ mean of log p(y|x) over the batch)²: one backward per batch, and an estimate
      of something else (about 1/batch of the empirical Fisher, plus the squared mean gradient)

    An example of a language model is a sequence; its log-likelihood is the sum over its supervised tokens, in nats.
    Cost: ``samples`` forward-backward passes of one example each (``batch``: fewer, larger ones).
    """
    examples = probe.examples(task, samples, seed)
    if not examples:
        raise UserError(f"Fisher information needs examples, and '{task or 'the training set'}' has none.")
    size = batch if kind == "batch" else 1
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    generator = torch.Generator().manual_seed(seed)
    kept = {name: param.grad for name, param in params.items()}
    total = {name: torch.zeros_like(local(param)) for name, param in params.items()}
    try:
        for group in groups:
            for name, gradient in _gradients(params, probe, group, kind, generator).items():
                total[name].addcmul_(gradient, gradient, value=1 / len(groups))
    finally:
        for name, param in params.items():
            param.grad = kept[name]
    return total


def _gradients(
    params: Params, probe: Probe, group: Sequence[Any], kind: Kind, generator: torch.Generator
) -> dict[str, Tensor]:
    for param in params.values():
        param.grad = None
    labels = "model" if kind == "true" else "data"
    (probe.log_likelihood(group, labels, generator) / len(group)).backward()
    return {name: local(param.grad) for name, param in params.items() if param.grad is not None}


def of_past(
    params: Params, probe: Probe | None, kind: Kind, samples: int, batch: int, seed: int, decay: float, method: str
) -> dict[str, Tensor]:
    """The Fisher of all past tasks at the current weights: F ← decay·F + F_task, oldest first."""
    if probe is None or not probe.tasks():
        raise UserError(
            f"{method} needs data of what is to be kept, and there is none: pass memory={{'name': dataset, ...}}."
        )
    total: dict[str, Tensor] = {}
    for task in probe.tasks():
        found = diagonal(params, probe, task, kind, samples, batch, seed)
        total = {name: total[name].mul_(decay).add_(value) if total else value for name, value in found.items()}
    return total
