"""Batched greedy generation with cached keys; few-shot prefixes are run once and finished rows leave the batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from holdfast.errors import UserError
from holdfast.evaluate import text
from holdfast.evaluate.engine import CACHED_TOKENS, Engine
from holdfast.evaluate.forward import Cache, evaluation_mode, is_out_of_memory
from holdfast.evaluate.room import Room
from holdfast.evaluate.tree import trunks

MAX_ROWS, CPU_ROWS = 64, 16  # decoded together; a processor is saturated at sixteen
CPU_ALONE = 32  # new tokens up to which sixteen rows gain a processor 4 % (135M parameters), at ten times the memory
SMALL = 64 << 20  # bytes of weights: below, a step is mostly overhead, which rows share
KEEP = 0.75  # share of unfinished rows below which the batch is compacted


@dataclass
class Output:
    """What one prompt gave: the text before the first stop string, its tokens, and what went wrong."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    truncated: int = 0
    error: str = ""


@dataclass
class Prompt:
    """Token ids of a prompt, how many tokens to make at most, and the strings that end it."""

    index: int
    tokens: tuple[int, ...]
    max_new: int
    stop: tuple[str, ...]


def extract_answer(output: str, pattern: str | None) -> str:
    """The last match's group 1, stripped ("" without a match); the whole text stripped without a pattern."""
    if pattern is None:
        return output.strip()
    found = list(re.finditer(pattern, output))
    return (found[-1].group(1) or "").strip() if found else ""


def matches(metric: str, prediction: str, answer: str) -> bool:
    """Whether an extracted answer is right: equal once stripped, or (numeric_match) equal as numbers."""
    if metric == "numeric_match":
        return _number(prediction) == _number(answer)
    return prediction.strip() == answer.strip()


def _number(answer: str) -> Fraction | str:
    try:
        return Fraction(answer.strip().replace(",", "").replace("$", "").rstrip("."))
    except (ValueError, ZeroDivisionError):
        return answer.strip()


def cut(output: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    for mark in stop:
        if mark:
            output = output.split(mark, 1)[0]
    return output


def generate_texts(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[str] | Sequence[Sequence[str]] = (),
    limit: int,
    special: bool | None = None,
    on_item: Callable[[int], None] | None = None,
    sample: Callable[[Tensor], Tensor] | None = None,
) -> list[Output]:
    """Continue every prompt until EOS, a stop string or ``max_new_tokens``; texts are cut before the stop string.

    A prompt longer than limit − max_new_tokens loses tokens on its left, and the count is reported. ``sample`` maps
    logits [B, V] to token ids [B] (None: argmax). Cost: one forward over the distinct prompt tokens, then one token of
    every unfinished row a step.
    """
    outputs = [Output() for _ in prompts]
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    one = tuple(mark for mark in stop if isinstance(mark, str))
    each = [one] * len(prompts) if one or not stop else [tuple(marks) for marks in stop]
    asked = []
    for index, (prompt, ids) in enumerate(zip(prompts, _encode(tokenizer, prompts, special))):
        if isinstance(ids, str):
            outputs[index].error = ids
            continue
        room = limit - most[index]
        if room < 1:
            outputs[index].error = f"max_new_tokens {most[index]} leaves no room: the model sees {limit} tokens"
            continue
        tokens = tuple(ids) if prompt and ids else (text.prefix_token(tokenizer),)
        outputs[index].truncated = max(0, len(tokens) - room)
        asked.append(Prompt(index, tokens[-room:], most[index], each[index]))
    with evaluation_mode(engine.forward.model):
        engine.check()
        made = _Decoder(engine, tokenizer, sample).run(asked, on_item)
    for prompt_, new in zip(asked, made):
        output = outputs[prompt_.index]
        output.tokens = tuple(new)
        output.text = cut(tokenizer.decode(new, skip_special_tokens=True), prompt_.stop)
    return outputs


def _encode(tokenizer: Any, prompts: Sequence[str], special: bool | None) -> list[list[int] | str]:
    try:
        return list(text.encode(tokenizer, prompts, special))
    except Exception:
        found: list[list[int] | str] = []
        for prompt in prompts:
            try:
                found.append(text.encode(tokenizer, [prompt], special)[0])
            except Exception as error:
                found.append(f"can't be tokenized: {error}")
        return found


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a generation, from the generation config and the tokenizer."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return {int(i) for i in {*listed, tokenizer.eos_token_id} if i is not None}


class _Decoder:
    def __init__(self, engine: Engine, tokenizer: Any, sample: Callable[[Tensor], Tensor] | None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.forward = engine.forward
        self.choose = sample or (lambda logits: logits.argmax(dim=-1))
        self.end = end_tokens(self.forward.model, tokenizer)
        self.weights = sum(param.numel() * param.element_size() for param in self.forward.model.parameters())

    def run(self, prompts: list[Prompt], on_item: Callable[[int], None] | None) -> list[list[int]]:
        """The new tokens of each prompt, EOS not included."""
        made: list[list[int]] = [[] for _ in prompts]
        share = self.forward.packed
        groups = (
            trunks([p.tokens for p in prompts], self.engine.trunk_cost) if share else [((), [*range(len(prompts))])]
        )
        for trunk, members in groups:
            cache = self.forward.prefill(trunk) if trunk else []
            pending = self._plan(prompts, members, len(trunk))[::-1]
            while pending:
                batch = pending.pop()
                try:
                    chosen = [prompts[k] for k in batch]
                    new = self._batch(chosen, trunk, cache) if share else self._plain(chosen)
                    for k, tokens in zip(batch, new):
                        made[k] = tokens
                except Exception as error:
                    if not is_out_of_memory(error) or self.forward.lockstep or len(batch) == 1:
                        raise
                    pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
                    continue
                if on_item is not None:
                    on_item(len(batch))
        return made

    def _plan(self, prompts: list[Prompt], members: list[int], trunk: int) -> list[list[int]]:
        """Prompts of like length together, longest first, within the rows and cached tokens of a batch."""
        room = CACHED_TOKENS * self.engine.batch_tokens
        plan: list[list[int]] = []
        for k in sorted(members, key=lambda k: len(prompts[k].tokens) + prompts[k].max_new, reverse=True):
            if plan:
                first = prompts[plan[-1][0]]
                width = len(first.tokens) + first.max_new
                if len(plan[-1]) < self._rows(first.max_new) and (len(plan[-1]) + 1) * width <= room:
                    plan[-1].append(k)
                    continue
            plan.append([k])
        return plan

    def _rows(self, new: int) -> int:
        if self.forward.device.type != "cpu":
            return MAX_ROWS
        return 1 if new <= CPU_ALONE and self.weights > SMALL else CPU_ROWS

    def _batch(self, prompts: list[Prompt], trunk: tuple[int, ...], cache: Cache) -> list[list[int]]:
        rest = [p.tokens[len(trunk) :] for p in prompts]
        width, device = max(map(len, rest)), self.forward.device
        ids = torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in rest], device=device)
        pads = torch.tensor([width - len(tokens) for tokens in rest], device=device)
        total = len(trunk) + width + max(p.max_new for p in prompts)
        column = torch.arange(total, device=device)
        valid = (column < len(trunk))[None] | (column >= len(trunk) + pads[:, None])
        positions = torch.where(column < len(trunk), column, column - pads[:, None]).clamp_min_(0)
        past: Any = DynamicCache()
        layers = getattr(self.forward.config, "num_hidden_layers", len(cache))
        past.layers = [Room(len(prompts), total, cache[k] if cache else None) for k in range(layers)]
        made: list[list[int]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        done = [False] * len(prompts)
        start = len(trunk)
        while True:
            for part in ids.split(max(1, self.engine.batch_tokens // len(ids)), dim=1):  # long prompts in several steps
                logits = self._step(part, start, valid, positions, past)
                start += part.shape[1]
            chosen = self.choose(logits).tolist()
            for row, k in enumerate(alive):
                done[k] = done[k] or self._ends(made[k], chosen[row], prompts[k])
            kept = [row for row, k in enumerate(alive) if not done[k]]
            if not kept:
                return made
            if len(kept) <= KEEP * len(alive):  # until then a finished row rides along: compacting copies the cache
                rows = torch.tensor(kept, device=device)
                valid, positions = valid[rows], positions[rows]
                for layer in past.layers:
                    layer.keep(rows)
                alive, chosen = [alive[row] for row in kept], [chosen[row] for row in kept]
            ids = torch.tensor(chosen, device=device)[:, None]

    def _ends(self, made: list[int], token: int, prompt: Prompt) -> bool:
        """Add the token unless it ends the text; True once the row is finished."""
        if token in self.end:
            return True
        made.append(token)
        if len(made) >= prompt.max_new:
            return True
        if not prompt.stop:
            return False
        tail = self.tokenizer.decode(made[-(max(map(len, prompt.stop)) + 2) :], skip_special_tokens=True)
        return any(mark in tail for mark in prompt.stop if mark)

    def _plain(self, prompts: list[Prompt]) -> list[list[int]]:
        """For models without block masks: transformers' own generate, padded on the left."""
        if self.forward.lockstep:
            name = type(self.forward.model).__name__
            raise UserError(f"{name} takes no block mask, and can't generate with sharded weights.")
        width, device = max(len(p.tokens) for p in prompts), self.forward.device
        ids = torch.tensor([[0] * (width - len(p.tokens)) + list(p.tokens) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in prompts], device=device)
        made = self.forward.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(p.max_new for p in prompts),
            do_sample=False,
            pad_token_id=min(self.end, default=0),
        )[:, width:].tolist()
        found = []
        for prompt, tokens in zip(prompts, made):
            text_: list[int] = []
            for token in tokens:
                if self._ends(text_, token, prompt):
                    break
            found.append(text_)
        return found

    def _step(self, ids: Tensor, start: int, valid: Tensor, positions: Tensor, past: DynamicCache) -> Tensor:
        end = start + ids.shape[1]
        seen, query = valid[:, :end], positions[:, start:end]
        column = torch.arange(end, device=ids.device)
        visible = seen[:, None, :] & (column[None, :] <= column[start:end, None])[None]
        visible |= (column[None, :] == column[start:end, None])[None]  # a padding token sees itself: no empty softmax
        last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
        logits, _ = self.forward(
            need=last,
            input_ids=ids,
            attention_mask=self.forward.attention(visible, query, positions[:, :end]),
            position_ids=query,
            past_key_values=past,
            use_cache=True,
        )
        return logits
