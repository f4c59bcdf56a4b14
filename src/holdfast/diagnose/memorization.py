"""Exact memorization of the tuning data (paper 2, section 5.1; Tirumala et al. 2022), and its size in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from holdfast.diagnose.ranking import LOGITS
from holdfast.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answers(tuning: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], int]]:
    """(token ids of prompt and answer, number of prompt tokens) of every row.

    Rows have ``prompt`` and ``completion`` (text, or messages), ``messages`` (the last one is the answer) or ``text``
    (all of it counts as the answer). Raises UserError for other columns.
    """
    columns = set(tuning.column_names)
    if not columns & {"completion", "messages", "text"}:
        have = ", ".join(sorted(columns))
        raise UserError(f"tuning data: prompt and completion, messages, or text are needed; its columns are {have}")
    for row in tuning:
        prompt, whole = _texts(row, tokenizer)
        before = tokenizer(prompt)["input_ids"] if prompt else []
        ids = tokenizer(whole)["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))
        if len(ids) > shared:
            yield list(ids), shared


def _texts(row: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if row.get("messages"):
        return _chat(row["messages"][:-1], row["messages"], tokenizer)
    if "completion" in row:
        prompt, completion = row.get("prompt") or "", row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt, prompt + completion
        return _chat(list(prompt), [*prompt, *completion], tokenizer)
    return "", str(row["text"])


def _chat(before: list[Any], whole: list[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not tokenizer.chat_template:
        text = "\n".join(str(message["content"]) for message in before)
        return text, "\n".join(str(message["content"]) for message in whole)
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True) if before else ""
    return str(prompt), str(tokenizer.apply_chat_template(whole, tokenize=False))


def count_tokens(tuning: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of one epoch of the tuning data, prompts included."""
    return sum(len(ids) for ids, _ in answers(tuning, tokenizer))


def exact_memorization(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tuning: Dataset, max_length: int = 1024
) -> float:
    """Share of answer tokens that are the argmax given everything before them: EM = mean 1[argmax f(s) = y].

    Paper 2, section 5.1. Tokens past ``max_length`` are left out. Cost: one forward pass over the data.
    """
    import torch

    rows = [(ids[:max_length], start) for ids, start in answers(tuning, tokenizer)]
    rows = sorted((row for row in rows if len(row[0]) > max(1, row[1])), key=lambda row: -len(row[0]))
    budget = max(max_length, LOGITS // int(model.config.get_text_config().vocab_size))
    hits = total = 0
    training = model.training
    model.eval()
    try:
        while rows:
            size = max(1, budget // len(rows[0][0]))
            batch, rows = rows[:size], rows[size:]
            ids_BL = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.long)
            answer_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
            for index, (ids, start) in enumerate(batch):
                ids_BL[index, : len(ids)] = torch.tensor(ids)
                answer_BL[index, max(1, start) : len(ids)] = True
            with torch.inference_mode():
                best_BL = model(ids_BL.to(model.device), use_cache=False).logits[:, :-1].argmax(dim=-1).cpu()
            right = (best_BL == ids_BL[:, 1:]) & answer_BL[:, 1:]
            hits += int(right.sum())
            total += int(answer_BL[:, 1:].sum())
    finally:
        model.train(training)
    if not total:
        raise UserError("tuning data: no answer tokens to look at")
    return hits / total
