"""measure: one row per item, with its score and probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from holdfast.errors import UserError
from holdfast.evaluate import text
from holdfast.evaluate.engine import Engine, Score
from holdfast.evaluate.forward import evaluation_mode, world
from holdfast.evaluate.generate import extract_answer, generate_texts, matches
from holdfast.evaluate.sandbox import Sandbox
from holdfast.evaluate.tasks import EvalTask, Item
from holdfast.evaluate.text import BadItem
from holdfast.evaluate.tree import Question

Row = dict[str, Any]
Progress = Callable[[int], None] | None


def measure(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[EvalTask],
    *,
    batch_tokens: int | None = None,
    on_item: Progress = None,
    stride: int | None = None,
    sandbox: Sandbox | None = None,
) -> pd.DataFrame:
    """Score every item of every task with an in-memory causal LM; one row per item, in order.

    Columns: task, item, group, metric, score (0/1; perplexity: summed negative log-likelihood in nats), weight (1;
    perplexity: tokens), prediction, error (what is wrong with the item; its score is then NaN), truncated (tokens cut
    from the left to fit the model), chance (percent), and by kind
    choice: choice (index), logprobs (nats, one per choice), label_mass, choice_entropy, vocab_entropy (nats),
    confidence, memorization; generate: text; perplexity: words, bytes, memorization. `holdfast.evaluate.probes` says
    what they mean. ``batch_tokens`` bounds one forward (padding included); ``stride``: tokens a perplexity window
    moves on (None: no overlap). ``on_item`` gets the number of items just finished. Programs (metric pass@1) are run
    in ``sandbox`` and refused without. Train mode, RNG and grad mode are as before afterwards. With torch.distributed
    every rank must call: each scores its share and all get all rows. Cost: one forward over the distinct tokens.
    """
    for task in tasks:
        if task.metric == "pass@1" and sandbox is None:
            raise UserError(
                f"task '{task.name}' runs generated programs: pass sandbox=Sandbox() (--run-code) to allow it."
            )
    engine = Engine(model, batch_tokens)
    limit = text.max_length(engine.forward.model, tokenizer)
    frames = []
    with evaluation_mode(engine.forward.model):
        mine = [_share(task, engine) for task in tasks]
        rows = _choice_rows(engine, tokenizer, [t for t in mine if t[0].kind == "choice"], limit, on_item)
        for task, items in mine:
            if task.kind == "generate":
                rows[task.name] = _generate_rows(engine, tokenizer, task, items, limit, on_item, sandbox)
            elif task.kind == "perplexity":
                rows[task.name] = _perplexity_rows(engine, tokenizer, task, items, limit, stride, on_item)
        engine.forward.finish()
    for task in tasks:
        frames.extend(_gathered(task, rows[task.name], engine))
    return pd.DataFrame(frames)


def _share(task: EvalTask, engine: Engine) -> tuple[EvalTask, Sequence[Item]]:
    """This rank's items: neighbours go to the same rank, so that they can still share prefixes."""
    rank, ranks = engine.forward.rank, engine.forward.ranks
    bounds = [len(task.items) * k // ranks for k in range(ranks + 1)]
    return task, task.items[bounds[rank] : bounds[rank + 1]]


def _gathered(task: EvalTask, rows: list[Row], engine: Engine) -> list[Row]:
    if world()[1] == 1:
        return rows
    everyone: list[list[Row]] = [[] for _ in range(engine.forward.ranks)]
    torch.distributed.all_gather_object(everyone, rows)
    return [row for part in everyone for row in part]


def _row(task: EvalTask, item: Item) -> Row:
    return {
        "task": task.name,
        "item": item.id,
        "group": item.group,
        "metric": task.metric,
        "score": float("nan"),
        "weight": 1.0,
        "prediction": "",
        "error": "",
        "truncated": 0,
        "chance": task.chance,
    }


def _encoded(tokenizer: Any, pairs: list[list[tuple[str, str]]]) -> list[Any]:
    """Encode all items' pairs in one call; if a text is not encodable, one by one, with the error in its place."""
    try:
        flat = iter(text.encode_pairs(tokenizer, [pair for group in pairs for pair in group]))
        return [[next(flat) for _ in group] for group in pairs]
    except Exception:
        found: list[Any] = []
        for group in pairs:
            try:
                found.append(text.encode_pairs(tokenizer, group))
            except Exception as error:
                found.append(BadItem(f"can't be tokenized: {error}"))
        return found


def _check_choices(item: Item) -> None:
    if len(item.choices) < 1:
        raise BadItem("no choices")
    for k, choice in enumerate(item.choices):
        if not choice:
            raise BadItem(f"choice {k} is empty")
    if not isinstance(item.answer, int) or isinstance(item.answer, bool):
        raise BadItem(f"answer {item.answer!r} is no index of a choice")
    if not 0 <= item.answer < len(item.choices):
        raise BadItem(f"answer {item.answer} is out of range: there are {len(item.choices)} choices")


def _choice_rows(
    engine: Engine,
    tokenizer: Any,
    tasks: list[tuple[EvalTask, Sequence[Item]]],
    limit: int,
    on_item: Progress,
) -> dict[str, list[Row]]:
    """All choice tasks in one pool: better filled batches, and prefixes shared across tasks."""
    items = [(task, item) for task, members in tasks for item in members]
    rows = [_row(task, item) for task, item in items]
    encoded = _encoded(tokenizer, [[(item.prompt, choice) for choice in item.choices] for _, item in items])
    labels = _label_tokens(tokenizer, [item for _, item in items])
    asked: list[Question] = []
    owner: list[int] = []
    for index, ((_, item), pairs) in enumerate(zip(items, encoded)):
        try:
            _check_choices(item)
            if isinstance(pairs, BadItem):
                raise pairs
            for k, (_, continuation) in enumerate(pairs):
                if not continuation:
                    raise BadItem(f"choice {k} adds no token to the prompt")
            questions, rows[index]["truncated"] = text.question(pairs, limit, labels.get(item.choices, ()))
        except BadItem as error:
            rows[index]["error"] = str(error)
            continue
        asked += questions
        owner += [index] * len(questions)
    scores = engine.score(asked, on_item, finish=False)
    parts: dict[int, list[Score]] = {}
    for index, score in zip(owner, scores):
        parts.setdefault(index, []).append(score)
    for index, found in parts.items():
        _score_choices(rows[index], items[index][0], items[index][1], found)
    result: dict[str, list[Row]] = {task.name: [] for task, _ in tasks}
    for (task, _), row in zip(items, rows):
        result[task.name].append(row)
    return result


def _label_tokens(tokenizer: Any, items: Sequence[Item]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Vocabulary ids of the valid answer labels with and without a leading space, where every label is one token."""
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for choices in dict.fromkeys(item.choices for item in items):
        bare = [choice.strip() for choice in choices]
        if not bare or any(not label or len(label) > 12 for label in bare):
            continue
        ids = text.encode(tokenizer, [form for label in bare for form in (label, " " + label)], special=False)
        if all(min(len(ids[2 * k]), len(ids[2 * k + 1])) == 1 for k in range(len(bare))):
            found[choices] = tuple(sorted({form[0] for form in ids if len(form) == 1}))
    return found


def _score_choices(row: Row, task: EvalTask, item: Item, found: list[Score]) -> None:
    logprobs = np.asarray([value for score in found for value in score.logprobs])
    hits = [value for score in found for value in score.hits]
    lengths = [value for score in found for value in score.lengths]
    best = int(np.argmax(logprobs / _divisors(task.metric, item.choices)))
    share = np.exp(logprobs - logprobs.max())
    share /= share.sum()
    answer = int(item.answer or 0)
    row.update(
        score=float(item.choices[best] == item.choices[answer]),  # equal texts can't be told apart
        prediction=item.choices[best].strip(),
        choice=best,
        logprobs=logprobs.tolist(),
        label_mass=found[0].label_mass if len(found) == 1 else float("nan"),
        choice_entropy=float(-(share * np.log(np.maximum(share, 1e-300))).sum()),
        vocab_entropy=found[0].entropy if len(found) == 1 else float("nan"),
        confidence=float(share[best]),
        memorization=hits[answer] / lengths[answer],
    )


def _divisors(metric: str, choices: Sequence[str]) -> np.ndarray:
    """What each log-likelihood is divided by; lm-eval counts the choice without the space that joins it."""
    bare = [choice.removeprefix(" ") for choice in choices]
    if metric == "acc_norm":
        return np.asarray([max(1, len(choice)) for choice in bare])
    if metric == "acc_bytes":
        return np.asarray([max(1, len(choice.encode("utf-8", "surrogatepass"))) for choice in bare])
    return np.ones(len(bare))


def _generate_rows(
    engine: Engine,
    tokenizer: Any,
    task: EvalTask,
    items: Sequence[Item],
    limit: int,
    on_item: Progress,
    sandbox: Sandbox | None,
) -> list[Row]:
    rows = [_row(task, item) for item in items]
    outputs = generate_texts(
        engine,
        tokenizer,
        [item.prompt for item in items],
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        limit=limit,
        on_item=on_item,
    )
    for row, item, output in zip(rows, items, outputs):
        row["truncated"] = output.truncated
        row["error"] = output.error or ("" if item.answer is not None else "no answer to compare with")
        if row["error"]:
            continue
        if sandbox is not None and task.metric == "pass@1":
            failure = sandbox.run(f"{item.prompt}{output.text}\n{item.answer}")
            row.update(score=float(not failure), prediction=failure or "passed", text=output.text)
            continue
        answer = extract_answer(output.text, task.extract)
        row.update(score=float(matches(task.metric, answer, str(item.answer))), prediction=answer, text=output.text)
    return rows


def _perplexity_rows(
    engine: Engine,
    tokenizer: Any,
    task: EvalTask,
    items: Sequence[Item],
    limit: int,
    stride: int | None,
    on_item: Progress,
) -> list[Row]:
    rows = [_row(task, item) for item in items]
    prefix = text.prefix_token(tokenizer)
    asked: list[Question] = []
    owner: list[int] = []
    for index, item in enumerate(items):
        try:
            tokens = text.encode(tokenizer, [item.prompt])[0]
        except Exception as error:
            rows[index]["error"] = f"can't be tokenized: {error}"
            continue
        windows = text.rolling(tokens, prefix, limit, stride)
        if not windows:
            rows[index]["error"] = "empty text"
            continue
        asked += windows
        owner += [index] * len(windows)
    hits = [0] * len(items)
    tokens_in = [0] * len(items)
    nats = [0.0] * len(items)
    for index, score in zip(owner, engine.score(asked, on_item, finish=False)):
        nats[index] -= score.logprobs[0]
        hits[index] += score.hits[0]
        tokens_in[index] += score.lengths[0]
    for index in dict.fromkeys(owner):
        prompt = items[index].prompt
        rows[index].update(
            score=nats[index],
            weight=float(tokens_in[index]),
            words=float(len(prompt.split())),
            bytes=float(len(prompt.encode("utf-8", "surrogatepass"))),
            memorization=hits[index] / tokens_in[index],
        )
    return rows
