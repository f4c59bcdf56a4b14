"""What a training run would really learn from: the tokens with a loss, counted and shown before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.data.origins import ATTRIBUTE, where
from holdfast.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # rows tokenized at a time
SHOWN = 5  # rows named in an error


class Tokens(NamedTuple):
    """One example as TRL trains on it, before truncation."""

    ids: list[int]
    start: int  # position of the first token with a loss


@dataclass(frozen=True)
class Supervision:
    """Counts over a data set, in tokens after truncation."""

    rows: int
    tokens: int
    supervised: int  # tokens with a loss
    longest: int  # tokens of the longest example before truncation
    truncated: int  # examples whose answer (or text) is cut by max_length
    lost: int  # supervised tokens cut away
    empty_answers: int  # answers without text: the model learns to stop at once
    glued: int  # answers that follow the prompt's last letter without a space
    nothing: tuple[int, ...] = field(default=())  # rows without a token to learn; TRL drops them without a word

    def notes(self) -> list[str]:
        """What a person should know before training; empty if all is well."""
        found = []
        if self.nothing:
            found.append(f"{len(self.nothing)} examples have nothing to learn and are dropped")
        if self.truncated:
            found.append(f"{self.truncated} answers are cut by max_length ({self.lost} supervised tokens lost)")
        if self.empty_answers:
            found.append(f"{self.empty_answers} answers are empty")
        if self.glued:
            found.append(f"{self.glued} answers follow the prompt without a space or line break between them")
        return found


class Span(NamedTuple):
    """A piece of decoded text."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Shown:
    """One decoded example."""

    where: str
    spans: tuple[Span, ...]
    tokens: int
    supervised: int

    def __str__(self) -> str:
        return "".join(f"⟦{span.text}⟧" if span.supervised else span.text for span in self.spans)


@dataclass(frozen=True)
class Preview:
    """Decoded examples; printed by Rich, the supervised part is coloured and stands between ⟦ and ⟧."""

    examples: tuple[Shown, ...]

    def __str__(self) -> str:
        return "\n\n".join(f"{shown.where}\n{shown}" for shown in self.examples)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        panels = []
        for shown in self.examples:
            body = Text()
            for span in shown.spans:
                body.append(f"⟦{span.text}⟧" if span.supervised else span.text, "green" if span.supervised else "dim")
            counts = Text(f"loss on {shown.supervised} of {shown.tokens} tokens")
            at = Text(Path(shown.where).name)
            panels.append(Panel(body, title=at, title_align="left", subtitle=counts, subtitle_align="left"))
        return Group(*panels)


def check_supervised(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = 1024,
    *,
    nothing: str = "error",
) -> Supervision:
    """Count the tokens that TRL's SFTTrainer would train on, and refuse examples without one.

    The rules are TRL's: the end-of-text token is appended to plain text, the answer starts where the tokens of the
    prompt and of prompt + answer part, and everything from ``max_length`` on is cut (``keep_start``). A prompt that
    fills ``max_length`` leaves nothing to learn; TRL drops such an example silently, here it is a UserError that
    names file and line, or with ``nothing="report"`` a count. Cost: each example is tokenized twice.
    """
    rows = tokens = supervised = longest = truncated = lost = 0
    bare: list[int] = []
    for row, example in enumerate(tokenized(dataset, tokenizer)):
        length = len(example.ids)
        kept = length if max_length is None else min(length, max_length)
        learned = max(0, kept - example.start)
        if learned == 0 or kept < 2:  # the first token of a sequence is never predicted
            bare.append(row)
        rows, tokens, supervised = rows + 1, tokens + kept, supervised + learned
        truncated, lost = truncated + (kept < length), lost + length - max(kept, example.start)
        longest = max(longest, length)
    if bare and nothing == "error":
        raise _nothing_to_learn(dataset, tokenizer, bare, max_length)
    empty, glued = _oddities(dataset)
    return Supervision(rows, tokens, supervised, longest, truncated, lost, empty, glued, tuple(bare))


def preview(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, n: int = 3, max_length: int | None = None) -> Preview:
    """Decode ``n`` examples, spread evenly over the data set, with the part that has a loss marked."""
    n = min(n, len(dataset))
    chosen = [round(i * (len(dataset) - 1) / max(1, n - 1)) for i in range(n)]
    shown = []
    for row, example in zip(chosen, tokenized(dataset.select(chosen), tokenizer)):
        ids = example.ids[:max_length]
        pieces = [(ids[: example.start], False), (ids[example.start :], True)]
        spans = tuple(Span(str(tokenizer.decode(part)), flag) for part, flag in pieces if part)
        shown.append(Shown(where(dataset, row), spans, len(ids), max(0, len(ids) - example.start)))
    return Preview(tuple(shown))


def for_tokenizer(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The same data, with conversations written out as plain text if the tokenizer has no chat template.

    A base model knows no roles: one message before the answer becomes the prompt as it is, several are labelled
    (``User:``, ``Assistant:``); the answer follows on a new line. With a chat template, or for text, nothing changes.
    """
    if getattr(tokenizer, "chat_template", None) or not _is_chat(dataset):
        return dataset
    from holdfast.data.origins import Origins, remember

    origins: Origins | None = getattr(dataset, ATTRIBUTE, None)
    plain = dataset.map(_plain, remove_columns=[name for name in dataset.column_names if name == "messages"])
    return plain if origins is None else remember(plain, origins)


def tokenized(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Every example as token ids and the position where its loss starts, by TRL's rules."""
    if _is_chat(dataset) and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the data are conversations, but the tokenizer has no chat template; use a chat model, "
            "or write the conversations out as plain text first (holdfast.data.for_tokenizer)"
        )
    names = set(dataset.column_names)
    if not {"prompt", "completion"} <= names and not names & {"messages", "text"}:
        raise UserError(
            f"the data have the columns {', '.join(sorted(names))}; expected prompt and completion, or text"
        )
    for begin in range(0, len(dataset), BATCH):
        batch = dataset[begin : begin + BATCH]
        if "prompt" in names:
            yield from _pairs(batch["prompt"], batch["completion"], tokenizer)
        elif "messages" in names:
            yield from (Tokens(ids, 0) for ids in _template(batch["messages"], tokenizer, answer=False))
        else:
            texts = [_ended(text, tokenizer) for text in batch["text"]]
            yield from (Tokens(ids, 0) for ids in tokenizer(texts, verbose=False)["input_ids"])


def _pairs(prompts: Sequence[Any], completions: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    if isinstance(prompts[0], str):
        alone = tokenizer(list(prompts), verbose=False)["input_ids"]
        full = [p + _ended(c, tokenizer) for p, c in zip(prompts, completions)]
        whole = tokenizer(full, verbose=False)["input_ids"]  # a long example is our caller's business
    else:
        alone = _template(prompts, tokenizer, answer=True)
        whole = _template([p + c for p, c in zip(prompts, completions)], tokenizer, answer=False)
    for before, ids in zip(alone, whole):
        yield Tokens(ids, _common_prefix(before, ids))


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = str(tokenizer.eos_token)
    return text if text.endswith(end) else text + end


def _template(conversations: Sequence[Any], tokenizer: PreTrainedTokenizerBase, answer: bool) -> list[list[int]]:
    """``answer``: end with the tokens that open the assistant's turn."""
    try:
        encoded: Any = tokenizer.apply_chat_template(
            list(conversations), tokenize=True, return_dict=True, add_generation_prompt=answer
        )
    except Exception as error:  # a template refuses by raising its own jinja errors
        raise UserError(f"the chat template refuses a conversation: {error}") from error
    return list(encoded["input_ids"])


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    if first == second[: len(first)]:
        return len(first)
    return next(i for i, (a, b) in enumerate(zip([*first, -1], [*second, -2])) if a != b)


def _is_chat(dataset: Dataset) -> bool:
    names = dataset.column_names
    return "messages" in names or ("prompt" in names and len(dataset) > 0 and not isinstance(dataset[0]["prompt"], str))


def _plain(row: Mapping[str, Any]) -> dict[str, str]:
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    before, last = messages[:-1], messages[-1]
    if len(before) == 1:
        prompt = before[0]["content"] + "\n"
    else:
        prompt = (
            "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in before) + "Assistant: "
        )
    return {"prompt": prompt, "completion": last["content"]}


def _oddities(dataset: Dataset) -> tuple[int, int]:
    """Empty answers, and answers glued to their prompt."""
    if "prompt" not in dataset.column_names or _is_chat(dataset):
        return 0, 0
    empty = glued = 0
    for prompt, completion in zip(dataset["prompt"], dataset["completion"]):
        empty += not completion.strip()
        glued += bool(prompt and completion) and prompt[-1].isalnum() and completion[0].isalnum()
    return empty, glued


def _nothing_to_learn(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, bare: list[int], max_length: int | None
) -> UserError:
    row = bare[0]
    example = next(islice(tokenized(dataset.select([row]), tokenizer), 1))
    if max_length is not None and example.start >= max_length:
        why = f"the prompt has {example.start} tokens and max_length is {max_length}, so no token of the answer is left"
    else:
        why = f"of its {len(example.ids)} tokens none is left to predict"
    more = (
        f" ({len(bare)} such examples, also {', '.join(where(dataset, i) for i in bare[1:SHOWN])})" if bare[1:] else ""
    )
    return UserError(
        f"{where(dataset, row)}: nothing to learn: {why}{more}. Raise max_length, or leave these rows out."
    )
