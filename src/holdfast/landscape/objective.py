"""What a scan measures: the exact mean loss per supervised token over fixed, seeded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UserError

IGNORE = -100  # label of a token that isn't supervised, as in transformers
CHUNK = 1 << 20  # logits turned into losses at a time
COMPUTE = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Objective(Protocol):
    """A loss as a sum over parts: L = Σ sumᵢ / Σ weightᵢ. Parts are what ranks share out."""

    @property
    def parts(self) -> int:
        """How many parts there are, at least one."""
        ...

    def sums(self, model: nn.Module, part: int) -> tuple[Tensor, float]:
        """Sum of the losses of a part, with a graph if gradients are on, and the weight (tokens) it counts for."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of everything that decides the loss besides the model; "" if that can't be known."""
        ...


@dataclass(frozen=True)
class TokenLoss:
    """Mean negative log-likelihood in nats per supervised token of a causal LM over fixed batches.

    Each batch holds ``input_ids``, ``labels`` (-100 where not supervised) and, if padded, ``attention_mask``.
    Per-token losses are float32, their sum float64. ``compute`` is the autocast type; the weights keep theirs.
    """

    batches: tuple[dict[str, Tensor], ...]
    compute: str = "float32"

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE:
            raise UserError(f"compute must be one of {', '.join(COMPUTE)}, not '{self.compute}'")
        if not self.tokens:
            raise UserError("no token of the data is supervised: there is no loss to scan")

    @property
    def parts(self) -> int:
        return len(self.batches)

    @property
    def tokens(self) -> int:
        """Supervised tokens in all batches: labels that are predicted, so never a sequence's first."""
        return sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in self.batches)

    def sums(self, model: nn.Module, part: int) -> tuple[Tensor, float]:
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in self.batches[part].items()}
        # shift the labels, not the logits: a slice of the logits would copy them
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE).flatten()
        dtype = COMPUTE[self.compute]
        with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
            logits = model(**batch, use_cache=False).logits.flatten(0, -2)
        return _token_losses(logits, labels), float((labels != IGNORE).sum())

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.compute.encode())
        for batch in self.batches:
            for key in sorted(batch):
                digest.update(f"{key}{tuple(batch[key].shape)}".encode())
                digest.update(batch[key].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ −log p(label) over supervised tokens in float64, a chunk of tokens at a time."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, labels.numel(), max(1, CHUNK // logits.shape[-1])):
        rows = slice(start, start + max(1, CHUNK // logits.shape[-1]))
        part, targets = logits[rows], labels[rows]
        kept = targets != IGNORE
        if int(kept.sum()) < targets.numel() // 2:  # mostly prompts: cheaper to pick the rest than to skip it
            part, targets = part[kept], targets[kept]
        part = part if part.dtype == torch.float64 else part.float()
        total = total + F.cross_entropy(part, targets, reduction="none", ignore_index=IGNORE).double().sum()
    return total


@dataclass(frozen=True)
class FunctionLoss:
    """Any loss as a function of the model, for example a user's own metric: one part, weight one."""

    function: Callable[[nn.Module], Any]
    name: str = ""
    compute: str = "the function's own"
    parts: int = 1

    def sums(self, model: nn.Module, part: int) -> tuple[Tensor, float]:
        value = self.function(model)
        return (value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)), 1.0

    def fingerprint(self) -> str:
        return self.name


Data = Any  # an objective, a function of the model, batches, or examples with a tokenizer


def objective_of(data: Data, tokenizer: Any = None, *, compute: str = "float32", **subset: Any) -> Objective:
    """The objective behind what a user hands over.

    ``data``: an objective; a function model -> loss; ready batches (mappings with ``input_ids`` and ``labels``);
    or examples with TRL's columns and a ``tokenizer`` (see ``token_loss`` for the subset's settings).
    """
    if isinstance(data, (TokenLoss, FunctionLoss)) or hasattr(data, "sums"):
        return data
    if callable(data):
        return FunctionLoss(data)
    if tokenizer is not None:
        return token_loss(data, tokenizer, compute=compute, **subset)
    batches = [data] if isinstance(data, Mapping) else list(data)
    if not batches or not all("input_ids" in batch and "labels" in batch for batch in batches):
        raise UserError(
            "data must be a function of the model, batches with 'input_ids' and 'labels', "
            "or examples together with tokenizer=…"
        )
    return TokenLoss(tuple({key: torch.as_tensor(batch[key]) for key in batch} for batch in batches), compute)


def token_loss(
    data: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    examples: int = 64,
    max_length: int = 512,
    batch_tokens: int = 4096,
    seed: int = 0,
    compute: str = "float32",
) -> TokenLoss:
    """The loss over a fixed subset: ``examples`` rows drawn with ``seed``, at most ``max_length`` tokens each.

    Rows have TRL's columns: ``prompt`` and ``completion`` (only the completion is supervised), ``text`` or
    ``messages`` (every token is). Batches hold at most ``batch_tokens`` tokens, padding included. The same
    arguments give the same batches; the subset's digest is part of a surface's cache key.

    Raises UserError if a row has none of these columns or no supervised token is left.
    """
    rows: Sequence[Mapping[str, Any]] = data if hasattr(data, "__getitem__") else list(data)  # type: ignore[assignment]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:examples].tolist()
    encoded = [_encode(rows[i], tokenizer, max_length, i) for i in sorted(order)]
    encoded = sorted((pair for pair in encoded if len(pair[0]) > 1), key=lambda pair: len(pair[0]))
    batches: list[dict[str, Tensor]] = []
    waiting: list[tuple[list[int], list[int]]] = []
    for pair in encoded:
        if waiting and len(pair[0]) * (len(waiting) + 1) > batch_tokens:
            batches.append(_collate(waiting, tokenizer))
            waiting = []
        waiting.append(pair)
    if waiting:
        batches.append(_collate(waiting, tokenizer))
    return TokenLoss(tuple(batches), compute)


def _encode(row: Mapping[str, Any], tokenizer: Any, max_length: int, index: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row; the end-of-text token follows what is supervised, as in TRL."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "prompt" in row and "completion" in row:
        prompt, whole = _texts(row["prompt"], row["completion"], tokenizer)
        ids = [*tokenizer(whole)["input_ids"], *end]
        start = len(tokenizer(prompt)["input_ids"])
    elif "messages" in row:
        ids, start = tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"], 0
    elif "text" in row:
        ids, start = [*tokenizer(row["text"])["input_ids"], *end], 0
    else:
        raise UserError(f"row {index} has columns {sorted(row)}; expected prompt and completion, text, or messages")
    return ids[:max_length], ([IGNORE] * start + ids[start:])[:max_length]


def _texts(prompt: Any, completion: Any, tokenizer: Any) -> tuple[str, str]:
    if isinstance(prompt, str):
        return prompt, prompt + completion
    template = tokenizer.apply_chat_template
    return template(prompt, tokenize=False, add_generation_prompt=True), template(prompt + completion, tokenize=False)


def _collate(pairs: list[tuple[list[int], list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in pairs)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in pairs]),
        "labels": torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in pairs]),
    }
    if any(len(ids) < width for ids, _ in pairs):
        batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in pairs])
    return batch


@torch.no_grad()
def mean_loss(objective: Objective, model: nn.Module, parts: Iterable[int] | None = None) -> tuple[float, float]:
    """Sum of losses and weight over some parts (all by default), added up in float64; model used as it is."""
    total, weight = 0.0, 0.0
    for part in range(objective.parts) if parts is None else parts:
        value, count = objective.sums(model, part)
        total += float(value.detach().double())
        weight += count
    return total, weight


def evaluation_loss(model: nn.Module, data: Data, tokenizer: Any = None, **settings: Any) -> float:
    """The loss of the model as it stands, in eval mode: the value at the centre of a surface, exactly.

    L = Σ over supervised tokens of −log p(token) / their number, in nats. Takes what ``surface`` takes as data.
    """
    objective = objective_of(data, tokenizer, **settings)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        total, weight = mean_loss(objective, model)
    finally:
        for module, mode in modes:
            module.training = mode
    return total / weight
