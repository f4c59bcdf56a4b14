"""Plain text from files, folders or the hub, as a stream of passages that never holds more than one of them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from holdfast.errors import UserError, did_you_mean

TEXT, TABLES = (".txt", ".md", ".text"), (".jsonl", ".json", ".csv", ".parquet")
LAB = "lab"
PASSAGE_WORDS = 200  # one passage: about 256 tokens of English


@dataclass(frozen=True)
class Passage:
    """A piece of text and where it came from (``file:line`` or ``name:row``)."""

    text: str
    place: str

    @property
    def key(self) -> int:
        """64 bits of SHA-256 of the text with its white space evened out: equal texts have equal keys."""
        return int.from_bytes(hashlib.sha256(" ".join(self.text.split()).encode()).digest()[:8], "little")


def read_passages(
    source: str | Path, *, column: str = "text", passage_words: int = PASSAGE_WORDS, split: str = "train"
) -> Iterator[Passage]:
    """Stream the passages of a corpus in a fixed order.

    ``source`` is a file (plain text, or rows with a text ``column``: .jsonl, .json, .csv, .parquet; .gz of the text
    kinds), a folder of them (by name, recursively), ``lab`` (its text for restoring; ``lab:train`` is what its model
    was pretrained on), or a hub id (streamed, ``split``; ``name:config``). Lines of plain text are joined up to
    ``passage_words`` words; longer lines and documents are cut there. Memory: one passage (256 rows of a Parquet file;
    a .json file is read whole). Raises UserError for a source that isn't there or holds no text.
    """
    if passage_words < 1:
        raise UserError(f"passage_words must be at least 1, not {passage_words}")
    found = False
    for passage in _passages(str(source), column, passage_words, split):
        found = True
        yield passage
    if not found:
        raise UserError(f"{source}: no text in this corpus")


def _passages(source: str, column: str, words: int, split: str) -> Iterator[Passage]:
    path = Path(source).expanduser()
    if source.split(":")[0] == LAB:
        from holdfast.lab.corpus import corpus

        part = source.partition(":")[2] or "restore"
        for number, text in enumerate(corpus(part), start=1):  # type: ignore[arg-type]  # it checks the name
            yield from _cut(text, f"{source}:{number}", words)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in TEXT + TABLES)
        if not files:
            raise UserError(f"{path}: no text in this folder; files may end in {', '.join(TEXT + TABLES)} (or .gz)")
        for file in files:
            yield from _file(file, column, words)
    elif path.is_file():
        yield from _file(path, column, words)
    elif path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such corpus file or folder")
    else:
        yield from _hub(source, column, words, split)


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else path.suffix


def _file(path: Path, column: str, words: int) -> Iterator[Passage]:
    kind = _kind(path)
    try:
        if kind == ".parquet":
            rows = _parquet(path)
        elif kind in TABLES:
            with _open(path) as file:
                for row, place in _rows(file, kind, path):
                    yield from _cut(_column(row, column, place), place, words)
            return
        elif kind in TEXT:
            with _open(path) as file:
                yield from _join(file, str(path), words)
            return
        else:
            raise UserError(f"{path}: a corpus file ends in {', '.join(TEXT + TABLES)} (or .gz), not '{kind}'")
        for row, place in rows:
            yield from _cut(_column(row, column, place), place, words)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _rows(file: IO[str], kind: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if kind == ".csv":
        for number, row in enumerate(csv.DictReader(file), start=2):
            yield row, f"{path}:{number}"
        return
    lines: Iterable[Any] = [file.read()] if kind == ".json" else file
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        for index, row in enumerate(value if isinstance(value, list) else [value]):
            place = f"{path}:{number}" if kind == ".jsonl" else f"{path}[{index}]"
            yield row if isinstance(row, dict) else {"text": row}, place


def _parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}:{number}"


def _hub(name: str, column: str, words: int, split: str) -> Iterator[Passage]:
    import datasets

    from holdfast.hub import hub_is_unreachable

    if hub_is_unreachable():
        raise UserError(f"{name}: no such corpus file or folder, and the hub can't be reached from here")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # the hub raises many kinds: not found, gated, no connection
        raise UserError(f"{name}: neither a file, a folder, nor a data set that the hub gives: {error}") from error
    for number, row in enumerate(rows, start=1):
        place = f"{name}:{number}"
        yield from _cut(_column(row, column, place), place, words)


def _column(row: dict[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise UserError(f"{place}: no column '{column}'.{did_you_mean(column, map(str, row))}")
    value = row[column]
    return value if isinstance(value, str) else ""


def _cut(text: str, place: str, words: int) -> Iterator[Passage]:
    """A document in pieces of at most ``words`` words; white space inside a piece is kept when it fits whole."""
    parts = text.split()
    if not parts:
        return
    if len(parts) <= words:
        yield Passage(text.strip(), place)
        return
    for start in range(0, len(parts), words):
        yield Passage(" ".join(parts[start : start + words]), place)


def _join(lines: Iterable[str], path: str, words: int) -> Iterator[Passage]:
    """Neighbouring lines of plain text, joined while they fit."""
    held: list[str] = []
    count, first = 0, 1
    for number, raw in enumerate(lines, start=1):
        line = raw.strip()
        size = len(line.split())
        if not size:
            continue
        if held and count + size > words:
            yield Passage("\n".join(held), f"{path}:{first}")
            held, count = [], 0
        if size > words:
            yield from _cut(line, f"{path}:{number}", words)
            continue
        if not held:
            first = number
        held.append(line)
        count += size
    if held:
        yield Passage("\n".join(held), f"{path}:{first}")
