"""From a recipe's task specs to data: training sets in TRL's columns and questions to score."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError
from holdfast.evaluate.tasks import EvalTask, Item
from holdfast.files import canonical
from holdfast.recipe import EvalSpec, PanelSpec, Recipe, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LAB = "lab:"


def dataset_hash(dataset: Dataset) -> str:
    """SHA-256 over the rows as canonical JSON: names the content, not how or where it was read."""
    hasher = hashlib.sha256()
    for row in dataset:
        hasher.update(canonical(row).encode())
        hasher.update(b"\n")
    return hasher.hexdigest()[:16]


@dataclass(frozen=True)
class TaskData:
    """A task of the stream, read: its training set and its questions."""

    spec: TaskSpec
    train: Dataset
    test: EvalTask
    notes: tuple[str, ...] = ()  # what a person should know of the training data

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def train_hash(self) -> str:
        return dataset_hash(self.train)


def load_tasks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[TaskData]:
    """Read every task of the stream; UserError names the task, file and line or column."""
    from holdfast.data import check_supervised, for_tokenizer

    loaded = []
    for spec in recipe.tasks:
        try:
            _refuse_shared_rows(spec, recipe)
            train = for_tokenizer(_training_set(spec, recipe), tokenizer)
            max_length = {**recipe.training, **spec.training}.get("max_length", 1024)
            notes = check_supervised(train, tokenizer, max_length).notes()
            loaded.append(TaskData(spec, train, eval_task(spec, recipe, tokenizer), tuple(notes)))
        except UserError as error:
            raise UserError(f"tasks.{spec.name}: {error}") from None
    return loaded


def _refuse_shared_rows(spec: TaskSpec, recipe: Recipe) -> None:
    """One local file for training and testing needs two splits of it."""
    train, test = spec.train or spec.source, spec.test or spec.source
    if train == test and spec.train_split == spec.test_split and Path(resolve(str(train), recipe)).is_file():
        raise UserError(
            f"{train}: training and testing would use the same rows. Give another `test` file, or split this one: "
            "train_split: '[:90%]', test_split: '[90%:]'."
        )


def load_panel(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[EvalTask]:
    """The panel's tasks: a named panel, then the recipe's own; none without a panel."""
    panel = recipe.panel or PanelSpec()
    tasks: list[EvalTask] = []
    if panel.name == "lab":
        from holdfast import lab

        tasks += lab.panel()
    elif panel.name is not None:
        from holdfast.evaluate.panels import load_panel as named_panel

        local = None if panel.local_data is None else resolve(panel.local_data, recipe)
        tasks += named_panel(panel.name, local_data=local, limit=panel.limit)
    for spec in panel.tasks:
        try:
            tasks.append(eval_task(spec, recipe, tokenizer))
        except UserError as error:
            raise UserError(f"panel.tasks.{spec.name}: {error}") from None
    names = [task.name for task in tasks] + [spec.name for spec in recipe.tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"panel: '{name}' is also the name of another task; rename one of them.")
    return [task.limit(panel.limit) for task in tasks]


def resolve(path: str, recipe: Recipe) -> str:
    """A recipe's path: relative ones start at ``data_dir``; what is no file there may be a hub data set id."""
    if Path(path).is_absolute() or recipe.data_dir is None:
        return path
    inside = Path(recipe.data_dir) / path
    looks_like_a_file = Path(path).suffix != "" or path.count("/") != 1
    return str(inside) if inside.exists() or looks_like_a_file else path


def _training_set(spec: TaskSpec, recipe: Recipe) -> Dataset:
    if spec.train is None:
        assert spec.source is not None  # the recipe checked that one of the two is there
        if spec.source.startswith(LAB):
            from holdfast import lab

            train = lab.load_task(spec.source.removeprefix(LAB), "train")
            return train.select(range(min(len(train), spec.train_limit or len(train))))
    from holdfast.data import read_examples

    return read_examples(
        resolve(spec.train or str(spec.source), recipe),
        format=spec.format,
        columns=spec.columns,
        prompt=spec.prompt,
        completion=spec.completion,
        split=spec.train_split or "train",
        limit=spec.train_limit,
    )


def eval_task(spec: EvalSpec, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> EvalTask:
    """The questions of one task, as the evaluation engine takes them."""
    if spec.test is None and spec.source is not None and spec.source.startswith(LAB):
        from holdfast import lab

        return lab.eval_task(spec.source.removeprefix(LAB)).limit(spec.test_limit)
    source = resolve(spec.test or str(spec.source), recipe)
    of_its_own = spec.test is not None and Path(source).is_dir() and spec.test != getattr(spec, "train", None)
    split = spec.test_split or (None if of_its_own else "test")
    if isinstance(spec.choices, str):
        return _column_choices(spec, spec.choices, source, split)
    if spec.answer is not None and spec.choices is None:
        return _generated(spec, _column_answers(spec, spec.answer, source, split))
    from holdfast.data import for_tokenizer, read_examples

    examples = read_examples(
        source,
        format="text" if spec.metric == "perplexity" and spec.format == "auto" else spec.format,
        columns=spec.columns,
        prompt=spec.prompt,
        completion=spec.completion,
        split=split,
        limit=spec.test_limit,
    )
    if spec.metric == "perplexity":
        return _perplexity(spec, examples)
    pairs = [_prompt_and_answer(row, tokenizer) for row in for_tokenizer(examples, tokenizer)]
    if spec.choices is not None:
        return _fixed_choices(spec, spec.choices, pairs)
    return _generated(spec, [(prompt, _expected(spec, answer, i)) for i, (prompt, answer) in enumerate(pairs)])


def _generated(spec: EvalSpec, pairs: Iterable[tuple[str, str]]) -> EvalTask:
    """Greedy answers to be compared with the expected ones."""
    return EvalTask(
        spec.name,
        "generate",
        tuple(Item(id=str(i), prompt=prompt, answer=answer) for i, (prompt, answer) in enumerate(pairs)),
        metric="numeric_match" if spec.metric == "numeric_match" else "exact_match",
        extract=spec.extract,
        stop=tuple(spec.stop),
        max_new_tokens=spec.max_new_tokens,
    )


def _column_answers(spec: EvalSpec, column: str, source: str, split: str | None) -> list[tuple[str, str]]:
    """Prompts and expected answers where the test file holds the bare answer in a column."""
    from holdfast.data import fill_template, raw_rows

    if spec.prompt is None:
        raise UserError("an `answer` column needs a `prompt` template, for example 'Question: {question}\\nAnswer:'.")
    pairs = []
    for i, row in enumerate(raw_rows(source, split=split, limit=spec.test_limit)):
        where = f"{source}: row {i + 1}"
        template = column if "{" in column else "{" + column + "}"
        pairs.append((fill_template(spec.prompt, row, where), fill_template(template, row, where).strip()))
    return pairs


def _perplexity(spec: EvalSpec, examples: Dataset) -> EvalTask:
    if "text" not in examples.column_names:
        raise UserError(f"perplexity needs plain text (a column `text`); there is {', '.join(examples.column_names)}.")
    items = tuple(Item(id=str(i), prompt=text) for i, text in enumerate(examples["text"]) if text.strip())
    return EvalTask(spec.name, "perplexity", items, metric="perplexity")


def _prompt_and_answer(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """One test row as the text the model sees and the text it should answer."""
    if "messages" in row:
        row = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if "prompt" not in row:
        raise UserError(
            "scoring answers needs a prompt and a completion; this is plain text. Give `prompt` and `completion` "
            "templates, or `metric: perplexity`."
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return prompt, completion
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return str(text), "".join(message["content"] for message in completion)


def _expected(spec: EvalSpec, answer: str, row: int) -> str:
    if spec.extract is None:
        return answer.strip()
    import re

    found = re.findall(spec.extract, answer)
    if not found:
        raise UserError(f"test row {row + 1}: `extract` {spec.extract!r} finds nothing in the answer {answer[:80]!r}.")
    last = found[-1]
    return (last if isinstance(last, str) else last[0]).strip()


def _fixed_choices(spec: EvalSpec, choices: list[str], pairs: Iterable[tuple[str, str]]) -> EvalTask:
    texts = tuple(spec.choice.format(choice=choice) for choice in choices)
    labels = [choice.strip() for choice in choices]
    items = []
    for i, (prompt, answer) in enumerate(pairs):
        if answer.strip() not in labels:
            raise UserError(f"test row {i + 1}: the answer {answer.strip()!r} is none of the choices {labels}.")
        items.append(Item(id=str(i), prompt=prompt, choices=texts, answer=labels.index(answer.strip())))
    return EvalTask(spec.name, "choice", tuple(items), metric=spec.metric or "acc", chance=100 / len(choices))


def _column_choices(spec: EvalSpec, column: str, source: str, split: str | None) -> EvalTask:
    """Multiple choice as benchmark files hold it: a column of choices and one with the right index or text."""
    from holdfast.data import fill_template, raw_rows

    items = []
    for i, row in enumerate(raw_rows(source, split=split, limit=spec.test_limit)):
        for needed in (column, spec.answer or "answer"):
            if needed not in row:
                raise UserError(f"{source}: row {i + 1} has no column '{needed}'; it has {', '.join(row)}.")
        choices, answer = [str(choice) for choice in row[column]], row[spec.answer or "answer"]
        if not isinstance(answer, int):
            if str(answer) not in choices:
                raise UserError(f"{source}: row {i + 1}: the answer {answer!r} is none of {choices}.")
            answer = choices.index(str(answer))
        if not 0 <= answer < len(choices):
            raise UserError(f"{source}: row {i + 1}: answer {answer} is out of range for {len(choices)} choices.")
        prompt = fill_template(spec.prompt or "{question}", row, f"{source}: row {i + 1}")
        texts = tuple(spec.choice.format(choice=choice) for choice in choices)
        items.append(Item(id=str(i), prompt=prompt, choices=texts, answer=answer))
    if not items:
        raise UserError(f"{source}: no rows.")
    chance = 100 * sum(1 / len(item.choices) for item in items) / len(items)
    return EvalTask(spec.name, "choice", tuple(items), metric=spec.metric or "acc", chance=round(chance, 2))
