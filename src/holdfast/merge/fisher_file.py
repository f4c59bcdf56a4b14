"""Fisher information of a model as a file: safetensors with the model's tensor names, float32, and how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdfast.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

FORMAT = "holdfast-fisher-1"
KINDS = ("empirical", "true", "batch")


def compute_fisher(
    model: Any,
    tokenizer: Any,
    data: Dataset,
    *,
    kind: Literal["empirical", "true", "batch"] = "empirical",
    samples: int = 256,
    batch: int = 8,
    max_length: int = 1024,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of a causal LM on examples (columns as TRL takes them), by parameter name.

    ``empirical``: mean over examples of (∇ log p(y|x))², y the data's labels; ``true``: y sampled from the model;
    ``batch``: squares of batch gradients (cheap, biased). Needs weights in float32. Cost: ``samples`` forward-backward
    passes of one example each, one extra copy of the weights and one of the gradients.
    """
    import torch

    from holdfast.methods.fisher import diagonal
    from holdfast.probe import ModelProbe
    from holdfast.tensors import trainable

    if kind not in KINDS:
        raise UserError(f"kind '{kind}' is unknown.{did_you_mean(kind, KINDS)}")
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def collate(rows: list[Any]) -> Mapping[str, Tensor]:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for row, (tokens, start) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    examples = _examples(data, tokenizer, max_length)
    probe = ModelProbe(model, {}, examples, collate, lambda rows: rows, True, device)
    return diagonal(trainable(model), probe, None, kind, samples, batch, seed)


def _examples(data: Dataset, tokenizer: Any, max_length: int) -> Sequence[tuple[list[int], int]]:
    """Token ids and where the answer starts, cut to ``max_length``; examples with nothing to predict are an error."""
    from holdfast.data.supervision import check_supervised, tokenized

    check_supervised(data, tokenizer, max_length)
    return [(example.ids[:max_length], example.start) for example in tokenized(data, tokenizer)]


def save_fisher(path: str | Path, values: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Write a Fisher file: float32 tensors, and ``about`` (kind, samples, seed, model, …) as metadata; atomic."""
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    metadata = {"format": "pt", "holdfast": FORMAT, "about": json.dumps(about, default=str)}
    try:
        save_file(
            {name: value.float().contiguous().cpu() for name, value in values.items()}, temporary, metadata=metadata
        )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
