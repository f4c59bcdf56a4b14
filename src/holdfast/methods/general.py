"""Mixing in data that no past task left behind: a corpus of the user's, or the base model's own samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from holdfast.errors import UserError
from holdfast.files import digest, sha256_file, write_json
from holdfast.method import Method
from holdfast.methods.mixing import MODES, Mode, mix, wanted
from holdfast.probe import evaluating, on_device
from holdfast.tensors import as_dtensor, make_editable


@dataclass
class General(Method):
    """Mix general data (instructions, plain text) into the training set, from the first task on; no past task needed.

    ``share`` of the final set comes from ``source``: a file, folder or data set as ``holdfast.data.read_examples``
    takes them. Examples are converted to the task's columns. ``mode`` as in rehearsal. arXiv 2502.06042 finds 1 % of
    pretraining data enough at scale. Cost: none with ``replace``; 1/(1−share) times the steps with ``add``.
    """

    source: str
    share: float = 0.1
    mode: Mode = "replace"
    limit: int | None = None  # rows of the source that are read

    name: ClassVar[str] = "general"
    symbols: ClassVar[Mapping[str, str]] = {"source": "source", "share": "share"}

    def __post_init__(self) -> None:
        self.require(bool(self.source), "source", "a file, folder or data set")
        self.require(0 <= self.share < 1, "share", "in [0, 1)")
        self.require(self.mode in MODES, "mode", "'replace' or 'add'")
        self.require(self.limit is None or self.limit >= 1, "limit", "at least 1")
        self.drawn: dict[str, int] = {}
        self.shortfall = 0

    def data(self, task: Any, memory: Mapping[str, Any]) -> Any:
        self.drawn, self.shortfall = {}, 0
        if self.share == 0:
            return task
        from holdfast.data import read_examples

        seed = int(getattr(memory, "seed", 0))
        rows = read_examples(self.source, limit=self.limit, seed=seed)
        pool = as_columns(rows.to_list(), columns_of(task, self.name), self.name)
        mixture = mix(task, {self.source: pool}, self.share, self.mode, seed, self.name)
        self.drawn, self.shortfall = mixture.drawn, mixture.shortfall
        return mixture.data


@dataclass
class PseudoRehearsal(Method):
    """Mix the base model's own samples into the training set: no past data needed (arXiv 2505.13811).

    Texts are sampled from the base model given its start token alone, at temperature 1 by default: in expectation
    their negative log-likelihood is KL(base ‖ model) up to a constant. ``share`` and ``mode`` as in rehearsal. The
    base is the ``base`` folder, else ``anchor``, else the model as it is when the trainer is made. Generated once per
    base, settings and seed, then read from the run's ``holdfast`` folder.
    Cost: ``max_new_tokens`` forward steps per sampled text, once; then as rehearsal.
    """

    share: float = 0.1
    mode: Mode = "replace"
    max_new_tokens: int = 128
    temperature: float = 1.0
    batch: int = 16

    name: ClassVar[str] = "pseudo_rehearsal"
    symbols: ClassVar[Mapping[str, str]] = {"share": "share"}

    def __post_init__(self) -> None:
        self.require(0 <= self.share < 1, "share", "in [0, 1)")
        self.require(self.mode in MODES, "mode", "'replace' or 'add'")
        self.require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        self.require(self.temperature > 0, "temperature", "above 0")
        self.require(self.batch >= 1, "batch", "at least 1")
        self.drawn: dict[str, int] = {}

    def data(self, task: Any, memory: Mapping[str, Any]) -> Any:
        self.drawn = {}
        if self.share == 0:
            return task
        columns = columns_of(task, self.name)
        seed = int(getattr(memory, "seed", 0))
        texts = self._texts(wanted(len(task), self.share, self.mode), seed, memory)
        pool = as_columns([{"text": text} for text in texts], columns, self.name)
        mixture = mix(task, {"base model": pool}, self.share, self.mode, seed, self.name)
        self.drawn = mixture.drawn
        return mixture.data

    def _texts(self, count: int, seed: int, memory: Mapping[str, Any]) -> list[str]:
        model, tokenizer = getattr(memory, "model", None), getattr(memory, "tokenizer", None)
        if model is None or tokenizer is None:
            raise UserError("pseudo_rehearsal: pass processing_class (the tokenizer) and a model, or base=<folder>.")
        cache = getattr(memory, "cache", None)
        key = digest([fingerprint(model), self.max_new_tokens, self.temperature, self.batch, count, seed])
        stored = None if cache is None else Path(cache) / f"samples-{key}.json"
        known = None
        if stored is not None and stored.is_file():
            known = json.loads(stored.read_text(encoding="utf-8"))
        known = from_first_rank(known)
        if known is not None:
            return list(known)
        texts = sample_texts(loaded(model), tokenizer, count, self.max_new_tokens, self.temperature, self.batch, seed)
        texts = from_first_rank(texts)
        if stored is not None:
            write_json(stored, texts)
        return texts


def sample_texts(
    model: Any, tokenizer: Any, count: int, tokens: int, temperature: float, batch: int, seed: int
) -> list[str]:
    """Texts sampled from the model given its start token, none of them empty; the random state is left as it was."""
    import torch

    from holdfast.probe import same_random_state

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("pseudo_rehearsal: the tokenizer has neither a start nor an end token to begin a text with.")
    texts: list[str] = []
    device = next(model.parameters()).device
    with same_random_state(device), evaluating(model), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(20 * (count // batch + 1)):
            if len(texts) >= count:
                break
            made = model.generate(
                torch.full((batch, 1), start, device=device),
                attention_mask=torch.ones((batch, 1), dtype=torch.long, device=device),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start,
                use_cache=True,
            )
            texts += [text for text in tokenizer.batch_decode(made, skip_special_tokens=True) if text.strip()]
    make_editable(model)  # FSDP2 leaves the weights of a forward without backward unsharded
    if len(texts) < count:
        raise UserError(f"pseudo_rehearsal: the base model gave only {len(texts)} non-empty texts of {count}.")
    return texts[:count]


def loaded(model: Any) -> Any:
    """A model object as it is; a checkpoint folder as a model, on the GPU if there is one."""
    if not isinstance(model, (str, Path)):
        return model
    from transformers import AutoModelForCausalLM

    return on_device(AutoModelForCausalLM.from_pretrained(str(model)))


def from_first_rank(value: Any) -> Any:
    """The first rank's value on every rank: GPUs that round differently would sample different texts."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def fingerprint(model: Any) -> str:
    """Content hash of a model's weights (an object or a folder)."""
    if isinstance(model, (str, Path)):
        files = sorted(Path(model).glob("*.safetensors"))
        return digest([sha256_file(file) for file in files] or str(model))
    import hashlib

    found = hashlib.sha256()
    for name, param in model.named_parameters():
        whole = param.full_tensor() if as_dtensor(param) is not None else param
        found.update(name.encode())
        found.update(whole.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def columns_of(task: Any, method: str) -> set[str]:
    """Column names of a training set; UserError for one without (general text fits no such data)."""
    columns = set(getattr(task, "column_names", None) or ())
    if not columns:
        raise UserError(f"{method} mixes in text, which needs a datasets.Dataset with columns that TRL knows.")
    return columns


def as_columns(rows: list[dict[str, Any]], columns: set[str], method: str) -> Any:
    """Rows with ``text``, ``prompt`` and ``completion``, or ``messages``, as a dataset with the given columns."""
    from datasets import Dataset

    if rows and columns == set(rows[0]):
        return Dataset.from_list(rows)
    if columns == {"text"}:
        return Dataset.from_list([{"text": as_text(row, method)} for row in rows])
    if columns == {"prompt", "completion"} and all("messages" not in row for row in rows):
        return Dataset.from_list([{"prompt": "", "completion": as_text(row, method)} for row in rows])
    raise UserError(
        f"{method}: data with the columns {sorted(rows[0]) if rows else []} can't be turned into the task's "
        f"{sorted(columns)}."
    )


def as_text(row: Mapping[str, Any], method: str) -> str:
    """One text of a row."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return f"{row['prompt']}{row['completion']}"
    raise UserError(f"{method}: conversations can't be turned into plain text; use a source with plain text.")
