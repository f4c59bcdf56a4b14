"""Scores questions by token trees: one forward for all choices of many questions, few-shot prefixes cached once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.evaluate.forward import Cache, Forward, evaluation_mode, expanded, is_out_of_memory
from holdfast.evaluate.tree import Batch, Question, batches

CPU_TOKENS = 640  # tokens a forward: more is no faster on two cores and takes more memory (benchmarks/evaluate.py)
ACCELERATOR_TOKENS = 16384
CACHED_TOKENS = 16  # cached tokens (trunk and rows) of one forward, in units of batch_tokens
CPU_HEAD_ROWS, HEAD_ROWS = 64, 256  # positions whose log-softmax is made at once
CPU_HEAD_VALUES, HEAD_VALUES = 1 << 22, 1 << 27  # float32 logits of a forward of several rows (16 and 512 MiB)


@dataclass
class Score:
    """What one question gave, per continuation: natural-log probability, tokens that are the argmax, and tokens.

    ``entropy`` (nats, over the vocabulary) and ``label_mass`` (probability of the question's labels) belong to the
    position right after the context.
    """

    logprobs: list[float] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    entropy: float = float("nan")
    label_mass: float = float("nan")


class Engine:
    """Scores and generates with an in-memory causal LM.

    ``batch_tokens``: tokens (padding included) of one forward; None picks by device. ``max_rows``: questions of one.
    On out-of-memory the batch is halved and run again, except with sharded weights, where one rank can't retry alone.
    """

    def __init__(self, model: nn.Module, batch_tokens: int | None = None, max_rows: int | None = None) -> None:
        self.forward = Forward(model)
        device = self.forward.device
        self.batch_tokens = batch_tokens or (CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS)
        self.max_rows = max_rows
        self.trunk_cost = 64 if device.type == "cpu" else 1024
        self.head_rows = CPU_HEAD_ROWS if device.type == "cpu" else HEAD_ROWS
        self.head_values = CPU_HEAD_VALUES if device.type == "cpu" else HEAD_VALUES
        self._checked = False

    def check(self) -> None:
        """Score a tiny tree both ways, once: a model that ignores block masks or caches is run without sharing."""
        if self._checked:
            return
        self._checked = True
        vocabulary = self.forward.model.get_input_embeddings().weight.shape[0]
        tokens = [(7 * k + 3) % max(2, vocabulary - 1) for k in range(32)]
        asked = [
            Question(tuple(tokens[:20]), ((tokens[20], tokens[21]), (tokens[22], tokens[23], tokens[24]))),
            Question((*tokens[:17], tokens[30]), ((tokens[25], tokens[26]),)),
        ]
        plain = self._score(asked, batches(asked, 64, share=False), share=False)
        try:
            shared = self._score(asked, batches(asked, 64, cost=0), share=True)
        except Exception as error:
            if is_out_of_memory(error) or self.forward.lockstep:
                raise
            difference = float("inf")
        else:
            difference = max(
                abs(a - b) for p, s in zip(plain, shared) for a, b in zip(p.logprobs, s.logprobs, strict=True)
            )
        dtype = next(self.forward.model.parameters()).dtype
        tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.5
        self.forward.packed = difference <= tolerance
        if not self.forward.packed:
            warnings.warn(
                f"{type(self.forward.model).__name__} takes no block mask or cache (log-likelihoods differ by "
                f"{difference:.2g}): scoring without shared prefixes.",
                stacklevel=3,
            )

    def score(
        self, questions: Sequence[Question], on_item: Callable[[int], None] | None = None, *, finish: bool = True
    ) -> list[Score]:
        """Score every question; same order as given. Without ``finish`` a sharded model's ranks are not yet released.

        Cost: one forward over the distinct tokens of the questions, plus one per shared trunk.
        """
        with evaluation_mode(self.forward.model):
            self.check()
            share = self.forward.packed
            vocabulary = self.forward.model.get_input_embeddings().weight.shape[0]
            plan = batches(
                questions,
                self.batch_tokens,
                share=share,
                cost=self.trunk_cost,
                memory=CACHED_TOKENS * self.batch_tokens,
                most=self.max_rows,
                heads=self.head_values // vocabulary,
            )
            scores = self._score(questions, plan, share=share, on_item=on_item)
            if finish:
                self.forward.finish()
        return scores

    def _score(
        self,
        questions: Sequence[Question],
        plan: list[Batch],
        *,
        share: bool,
        on_item: Callable[[int], None] | None = None,
    ) -> list[Score]:
        scores = [
            Score([0.0] * len(q.continuations), [0] * len(q.continuations), [len(c) for c in q.continuations])
            for q in questions
        ]
        trunk: tuple[int, ...] = ()
        cache: Cache = []
        pending = plan[::-1]
        while pending:
            batch = pending.pop()
            try:
                if batch.trunk != trunk:
                    cache = []  # freed before the next one is made
                    cache, trunk = (self.forward.prefill(batch.trunk) if batch.trunk else []), batch.trunk
                self._run(batch, cache, questions, scores, share)
            except Exception as error:
                if not is_out_of_memory(error) or self.forward.lockstep or len(batch.rows) == 1:
                    raise
                half = (len(batch.rows) + 1) // 2
                pending += [Batch(batch.trunk, batch.rows[half:]), Batch(batch.trunk, batch.rows[:half])]
                pending = pending[:-2] + pending[-2:]
                self.batch_tokens = max(64, self.batch_tokens // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            if on_item is not None:
                on_item(len({row.question for row in batch.rows}))
        return scores

    def _run(self, batch: Batch, trunk: Cache, questions: Sequence[Question], scores: list[Score], share: bool) -> None:
        """One forward and its bookkeeping."""
        rows, width, offset = batch.rows, batch.width, len(batch.trunk)
        tokens, positions, end = _padded(batch, width, offset)
        device = self.forward.device
        flat = [np.asarray(row.pairs, dtype=np.int64).reshape(-1, 3) for row in rows]
        nodes = np.concatenate([pairs[:, 0] + index * width for index, pairs in enumerate(flat)])
        targets = torch.from_numpy(np.concatenate([pairs[:, 1] for pairs in flat])).to(device)
        need, which = np.unique(nodes, return_inverse=True)
        ids = torch.from_numpy(tokens).to(device)
        inputs: dict[str, Any]
        mask: Any
        if share and not trunk and all(row.is_chain for row in rows):
            mask, inputs = None, {"use_cache": False}  # plain causal attention: its kernels are faster than masked ones
        elif share:
            position = torch.from_numpy(positions).to(device)
            visible = _visible(torch.from_numpy(end).to(device), offset)
            prefix = torch.arange(offset, device=device).expand(len(rows), -1)
            mask = self.forward.attention(visible, position, torch.cat([prefix, position], dim=1))
            cache = expanded(trunk, len(rows)) if trunk else None
            inputs = {"position_ids": position, "past_key_values": cache, "use_cache": cache is not None}
        else:
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = (torch.arange(width, device=device)[None] < lengths[:, None]).long()
            inputs = {"use_cache": False}
        logits, _ = self.forward(need=torch.from_numpy(need).to(device), input_ids=ids, attention_mask=mask, **inputs)
        first = [int(np.searchsorted(need, row.context_node + index * width)) for index, row in enumerate(rows)]
        probes = _probe(logits[first], [questions[row.question].labels for row in rows])
        logprobs, hits = _logprobs(logits, torch.from_numpy(which).to(device), targets, self.head_rows)
        start = 0
        for row, pairs, (entropy, mass) in zip(rows, flat, probes):
            score = scores[row.question]
            score.entropy, score.label_mass = entropy, mass
            for k, (_, _, continuation) in enumerate(pairs.tolist(), start):
                score.logprobs[continuation] += logprobs[k]
                score.hits[continuation] += hits[k]
            start += len(pairs)


def _padded(batch: Batch, width: int, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and subtree ends [B, L]; a padding token sees only itself."""
    tokens = np.zeros((len(batch.rows), width), dtype=np.int64)
    positions = np.full((len(batch.rows), width), offset, dtype=np.int64)
    end = np.tile(np.arange(1, width + 1, dtype=np.int64), (len(batch.rows), 1))
    for index, row in enumerate(batch.rows):
        tokens[index, : len(row)] = row.tokens
        positions[index, : len(row.positions)] = row.positions
        end[index, : len(row.end)] = row.end
    return tokens, positions, end


def _visible(end: Tensor, trunk: int) -> Tensor:
    """Who sees whom, [B, L, trunk + L]: node i sees node j if j <= i < end[j], and all of the trunk."""
    node = torch.arange(end.shape[1], device=end.device)
    visible = (node[None, None, :] <= node[None, :, None]) & (node[None, :, None] < end[:, None, :])
    if not trunk:
        return visible
    return torch.cat([torch.ones(*end.shape, trunk, dtype=torch.bool, device=end.device), visible], dim=2)


def _logprobs(logits: Tensor, which: Tensor, targets: Tensor, rows: int) -> tuple[list[float], list[int]]:
    """log-softmax at the targets and whether each is the argmax, ``rows`` positions at a time to save memory.

    torch.log_softmax on purpose: on the CPU its float32 sum is off by about 1e-5 a token, and lm-eval's numbers with
    it; a better sum would differ from lm-eval's by 1e-4 within ten tokens.
    """
    logprobs, hits = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.long)
    for start in range(0, len(logits), rows):
        block = logits[start : start + rows]
        inside = ((which >= start) & (which < start + rows)).nonzero()[:, 0]
        here, wanted = which[inside] - start, targets[inside]
        found = torch.log_softmax(block, dim=-1)[here, wanted]
        inside = inside.cpu()
        logprobs[inside] = found.cpu()
        hits[inside] = (block.argmax(dim=-1)[here] == wanted).long().cpu()
    return logprobs.double().tolist(), hits.tolist()


def _probe(logits: Tensor, labels: list[tuple[int, ...]]) -> list[tuple[float, float]]:
    """Entropy over the vocabulary in nats, and the summed probability of each row's label tokens."""
    log = torch.log_softmax(logits, dim=-1)
    probability = log.exp()
    entropy = -(probability * log.clamp_min_(-1e4)).sum(dim=-1)
    mass = [float(p[list(ids)].sum()) if ids else float("nan") for p, ids in zip(probability, labels)]
    return list(zip(entropy.tolist(), mass))
