"""Any source of examples as a data set with exactly the columns that TRL takes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.data.files import READERS, Row, folder_files, kind, missing_file, read_file
from holdfast.data.formats import Turns, converter, rename
from holdfast.data.origins import Origins, remember
from holdfast.errors import UserError
from holdfast.hub import hub_is_unreachable

if TYPE_CHECKING:
    from datasets import Dataset

PART = re.compile(r"([^\[]*)\[(-?\d+%?)?:(-?\d+%?)?\]")  # train[:90%], [-100:]
CHUNK = 20_000  # examples held as Python objects before they become Arrow


def read_examples(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    turns: Turns = "each",
) -> Dataset:
    """Read a source as ``prompt`` + ``completion`` (text, or message lists), ``text``, or ``messages``.

    ``source``: a .jsonl, .json, .csv, .tsv, .parquet or .txt file (.gz, .bz2, .xz too), a folder of them, a folder
    written by ``datasets``, or a hub data set as ``name`` or ``name:config``. ``format``: alpaca, sharegpt, messages,
    prompt_completion, text, or auto. ``columns`` gives the file's name for a role: ``{"prompt": "question"}``.
    ``prompt`` and ``completion`` are templates over the columns (see ``fill_template``) and are joined as they stand,
    so the completion carries its leading space. ``split`` names a split, or a part as on the hub: ``train[:90%]``,
    and ``[:90%]`` or ``[-100:]`` of a single file. ``limit`` draws that many rows without replacement by ``seed``, in
    the order of the file. ``chat`` turns text prompts into one user and one assistant message. ``turns`` says what a
    conversation with several answers becomes: an example for ``each``, the ``last`` alone, or whole (``keep``).

    Cost: one pass over the source; memory of the examples in Arrow (with ``limit``: of the drawn rows).
    Raises UserError with file and line for anything that can't be used, and for a source without rows.
    """
    from datasets import Dataset, concatenate_datasets

    rows, first = _with_first(_rows(source, split), source)
    if columns:
        first = Row(rename(first.values, columns, first.where), first.file, first.number)
    convert = converter(format, first.values, first.where, prompt=prompt, completion=completion, chat=chat, turns=turns)
    origins = Origins()
    parts = []
    for examples in _chunks(_examples(_sample(rows, limit, seed), columns, convert, origins)):
        names = examples[0].keys()
        parts.append(Dataset.from_dict({name: [example[name] for example in examples] for name in names}))
    return remember(parts[0] if len(parts) == 1 else concatenate_datasets(parts), origins)


def raw_rows(
    source: str | Path, *, split: str | None = None, limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of a source as they stand, for benchmarks; ``limit`` draws a seeded subset in the order of the file."""
    rows, _ = _with_first(_rows(source, split), source)
    return [row.values for row in _sample(rows, limit, seed)]


def train_test(dataset: Dataset, test: float | int = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split one data set into a training and a test part without overlap, seeded, each in the order of the source.

    ``test`` is a share below 1 or a number of rows. Raises UserError if a part would be empty.
    """
    count = round(test * len(dataset)) if isinstance(test, float) and test < 1 else int(test)
    if not 0 < count < len(dataset):
        raise UserError(f"test: {test} of {len(dataset)} rows leaves an empty part")
    chosen = set(random.Random(seed).sample(range(len(dataset)), count))
    return dataset.select([i for i in range(len(dataset)) if i not in chosen]), dataset.select(sorted(chosen))


def _with_first(rows: Iterator[Row], source: str | Path) -> tuple[Iterator[Row], Row]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: no rows, the data set is empty")
    return chain([first], rows), first


def _sample(rows: Iterable[Row], limit: int | None, seed: int) -> Iterable[Row]:
    """``limit`` rows drawn uniformly in one pass (reservoir sampling), in the order in which they came."""
    if limit is None:
        return rows
    if limit < 1:
        raise UserError(f"limit: {limit} is not a positive number of rows")
    generator = random.Random(seed)
    drawn: list[tuple[int, Row]] = []
    for i, row in enumerate(rows):
        if i < limit:
            drawn.append((i, row))
        elif (slot := generator.randrange(i + 1)) < limit:
            drawn[slot] = (i, row)
    return (row for _, row in sorted(drawn, key=lambda pair: pair[0]))


def _examples(
    rows: Iterable[Row], columns: Mapping[str, str] | None, convert: Any, origins: Origins
) -> Iterator[dict[str, Any]]:
    kinds: list[type] | None = None
    for row in rows:
        values = rename(row.values, columns, row.where) if columns else row.values
        for example in convert(values, row.where):
            found = [type(value) for value in example.values()]
            if kinds is None:
                kinds = found
            elif found != kinds:  # Arrow would say so less clearly
                raise UserError(f"{row.where}: text here, messages in the first row (or the other way round)")
            origins.append(row.file, row.number)
            yield example


def _chunks(examples: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# ---------------------------------------------------------------- sources


def _rows(source: str | Path, split: str | None) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.exists():
        match = PART.fullmatch(split or "")
        return _part(_local(path, match[1] or None), *match.group(2, 3)) if match else _local(path, split)
    text = str(source)
    if kind(Path(text)) in READERS or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text.strip():
        raise missing_file(path)
    return _hub(text, split)


def _local(path: Path, split: str | None) -> Iterator[Row]:
    if path.is_file():
        return read_file(path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    return chain.from_iterable(read_file(file) for file in folder_files(path, split))


def _part(rows: Iterator[Row], begin: str | None, end: str | None) -> Iterator[Row]:
    """The rows from ``begin`` to ``end`` (counts or percent, as hub splits write them); needs all rows in memory."""
    held = list(rows)

    def at(bound: str | None) -> int | None:
        if bound is None or not bound.endswith("%"):
            return None if bound is None else int(bound)
        return round(len(held) * int(bound[:-1]) / 100)

    return iter(held[at(begin) : at(end)])


def _saved(folder: Path, split: str | None) -> Iterator[Row]:
    """A folder written by ``Dataset.save_to_disk``."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: can't be read as a saved data set: {error}") from error
    if isinstance(dataset, DatasetDict):
        name = split or "train"
        if name not in dataset:
            raise UserError(f"{folder}: no split '{name}'; there are: {', '.join(map(str, dataset))}")
        dataset = dataset[name]
    return _numbered(dataset, str(folder))


def _hub(name: str, split: str | None) -> Iterator[Row]:
    """A hub data set, or one in the local cache of ``datasets``."""
    from datasets import load_dataset

    path, _, config = name.partition(":")
    offline = hub_is_unreachable()
    try:
        with _no_retries() if offline else nullcontext():
            dataset = load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # every builder and the network fail in their own ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "the hub can't be reached from here and its cache has no such data set" if offline else reason
        raise UserError(
            f"{name}: no such file here, and as a hub data set (split '{split or 'train'}') it can't be read: "
            f"{reason:.400}"
        ) from error
    return _numbered(dataset, name)


@contextmanager
def _no_retries() -> Iterator[None]:
    """Let ``datasets`` look in its cache only."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _numbered(dataset: Iterable[Any], name: str) -> Iterator[Row]:
    return (Row(dict(values), name, number) for number, values in enumerate(dataset, 1))
