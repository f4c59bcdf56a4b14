"""Perplexity of every passage of a corpus under one model: append-only, resumable, in flat memory (paper 2, 3.1)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from holdfast.diagnose.corpus import Passage
from holdfast.errors import UserError
from holdfast.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = np.dtype([("key", "<u8"), ("nats", "<f8"), ("tokens", "<i4")])  # 20 bytes a passage; no tokens: a duplicate
BLOCK = 256  # passages scored, sorted by length among themselves, and written together
SEEN = 1 << 20  # slots of the table that spares duplicates their forward pass: 8 MB, whatever the corpus
LOGITS = 1 << 25  # logits held at a time: 128 MB in fp32

Scorer = Callable[[Sequence[str]], list[tuple[float, int]]]  # texts -> (nats, tokens) of each


class Score(NamedTuple):
    """One passage's negative log-likelihood in nats, over so many tokens."""

    key: int
    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.tokens, 700.0)) if self.tokens else math.inf


class ScoreLog:
    """Scores in the order of the corpus, 20 bytes each, appended block by block.

    A record that a crash cut short is dropped on opening; every whole record stays and is never computed again.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.header = folder / "scores.bin", folder / "scores.json"
        if self.header.exists():
            stored = json.loads(self.header.read_text(encoding="utf-8"))
            if stored["settings"] != json.loads(json.dumps(settings)):
                raise UserError(f"{folder}: holds the ranking of another model, corpus or setting; use another folder")
        else:
            write_json(self.header, {"settings": settings, "complete": False})
        if self.path.exists():
            whole = self.path.stat().st_size // RECORD.itemsize * RECORD.itemsize
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def __len__(self) -> int:
        return self.path.stat().st_size // RECORD.itemsize if self.path.exists() else 0

    def __iter__(self) -> Iterator[Score]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            while block := file.read(RECORD.itemsize * 4096):
                for key, nats, tokens in np.frombuffer(block, RECORD).tolist():
                    yield Score(key, nats, tokens)

    def append(self, scores: Sequence[Score]) -> None:
        with self.path.open("ab") as file:
            file.write(np.array(scores, dtype=RECORD).tobytes())
            file.flush()
            os.fsync(file.fileno())

    @property
    def complete(self) -> bool:
        return bool(json.loads(self.header.read_text(encoding="utf-8"))["complete"])

    def finish(self) -> None:
        header = json.loads(self.header.read_text(encoding="utf-8"))
        write_json(self.header, header | {"complete": True, "passages": len(self)})


def rank(
    passages: Iterable[Passage], scorer: Scorer, log: ScoreLog, on_passages: Callable[[int], None] | None = None
) -> None:
    """Score every passage once, into ``log``; started again, it goes on after the last record on disk.

    Passages are read in order and scored in blocks of 256. Repeated texts cost no forward pass while the first is among
    the last million or so (the table is bounded); selection removes the rest. Memory: one block and 8 MB, whatever the
    size of the corpus. Raises UserError if the corpus isn't the one that the log was started with.
    """
    if log.complete:
        return
    seen = np.zeros(SEEN, dtype=np.uint64)
    stream = iter(passages)
    for done, score in enumerate(log, start=1):
        passage = next(stream, None)
        if passage is None or passage.key != score.key:
            raise UserError(f"{log.path}: the corpus changed since its ranking was started (passage {done})")
        seen[score.key % SEEN] = score.key
        if on_passages and done % BLOCK == 0:
            on_passages(BLOCK)
    while block := list(islice(stream, BLOCK)):
        keys = [passage.key for passage in block]
        fresh = []
        for index, key in enumerate(keys):
            if seen[key % SEEN] != key:
                seen[key % SEEN] = key
                fresh.append(index)
        scored = dict(zip(fresh, scorer([block[index].text for index in fresh]) if fresh else []))
        log.append([Score(key, *scored.get(index, (0.0, 0))) for index, key in enumerate(keys)])
        if on_passages:
            on_passages(len(block))
    log.finish()


class PerplexityScorer:
    """(nats, tokens) of texts under a causal LM: sum of -log p(token | before), the first token given the BOS token.

    Where the tokenizer has no BOS, EOS stands in for it. Texts longer than ``max_tokens`` count up to there. Batches
    hold as many padded tokens as keep the logits within 128 MB. Cost: one forward pass; eval mode is restored after.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 512) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens = max_tokens
        start = tokenizer.bos_token_id
        self.start = start if start is not None else tokenizer.eos_token_id
        if self.start is None:
            raise UserError("perplexity: the tokenizer has neither a BOS nor an EOS token")
        self.batch_tokens = max(max_tokens, LOGITS // int(model.config.get_text_config().vocab_size))

    def __call__(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        import torch

        rows = [row[: self.max_tokens] for row in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        result: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for batch in self._batches(rows):
                    for index, nats in zip(batch, self._nats([rows[index] for index in batch])):
                        result[index] = (nats, len(rows[index]))
        finally:
            self.model.train(training)
        return result

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of rows of similar length, longest first, within the token budget; empty rows are left out."""
        order = sorted((index for index in range(len(rows)) if rows[index]), key=lambda index: -len(rows[index]))
        while order:
            size = max(1, self.batch_tokens // len(rows[order[0]]))
            yield order[:size]
            order = order[size:]

    def _nats(self, rows: Sequence[Sequence[int]]) -> list[float]:
        import torch
        from torch.nn.functional import cross_entropy

        width = max(map(len, rows))
        device = self.model.device
        ids_BL = torch.full((len(rows), width + 1), self.start, dtype=torch.long)
        labels_BL = torch.full((len(rows), width), -100, dtype=torch.long)
        for index, row in enumerate(rows):
            ids_BL[index, 1 : len(row) + 1] = labels_BL[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        # Padding stands on the right and attention is causal, so no real token sees it.
        logits_BLV = self.model(ids_BL[:, :-1].to(device), use_cache=False).logits
        losses = cross_entropy(
            logits_BLV.float().flatten(0, 1), labels_BL.to(device).flatten(), ignore_index=-100, reduction="none"
        )
        return losses.view(len(rows), width).double().sum(dim=1).tolist()


def perplexity(scorer: Scorer, texts: Sequence[str]) -> float:
    """exp(sum of nats / sum of tokens) of the texts together: per token."""
    scores = scorer(texts)
    tokens = sum(count for _, count in scores)
    if not tokens:
        raise UserError("perplexity: no tokens in the text")
    return math.exp(min(sum(nats for nats, _ in scores) / tokens, 700.0))
