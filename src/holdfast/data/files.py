"""Rows out of files, one at a time, each with the file and line it came from."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import UserError, did_you_mean

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# what `datasets` writes beside the data
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
CSV_FIELD_LIMIT = 1 << 30  # characters; the default of 131,072 is shorter than a long document
FAILURES = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what a damaged compressed file raises


class Row(NamedTuple):
    """One row of a source."""

    values: dict[str, Any]
    file: str
    number: int  # the line, counted from 1; in .json and .parquet and on the hub, the row

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


def kind(path: Path) -> str:
    """``.jsonl`` for ``a.jsonl.gz``: the suffix below a compression's, in lower case."""
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return name.suffix.lower()


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, streamed (``.json`` is read whole). Raises UserError with file and line."""
    reader = READERS.get(kind(path))
    if reader is None:
        raise UserError(f"{path}: unknown kind of data file '{path.suffix}'. Known: {', '.join(READERS)}")
    return reader(path)


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder and its subfolders, by name; those of ``split`` where names tell it.

    Where there are structured files, ``.txt`` files (a licence, a note) are not data.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and kind(path) in READERS
        and path.name not in NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)  # .cache, .git
    ]
    files = [path for path in files if kind(path) not in TEXT] or files
    if not files:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder}: no data files ({', '.join(READERS)}) in this folder. It holds: {there}")
    named = [path for path in files if split in re.split(r"[^A-Za-z0-9]+", str(path.relative_to(folder)))]
    return named or files


def missing_file(path: Path) -> UserError:
    """The error for a path that isn't there, with the nearest name that is."""
    path = path.absolute()
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    return UserError(f"{path}: no such file or folder.{did_you_mean(path.name, names)[:300]}")


# ---------------------------------------------------------------- readers


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; UTF-8 with or without a byte order mark, or UTF-16 with one."""
    opener = OPENERS.get(path.suffix.lower(), open)
    number = 0
    try:
        with opener(path, "rb") as binary:
            head = binary.read(2)
            encoding = "utf-16" if head in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with opener(path, "rt", encoding=encoding) as text:
            for number, line in enumerate(text, 1):
                yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{_bad_line(path, opener, number)}: not UTF-8 text ({error.reason})") from error
    except FAILURES as error:
        raise UserError(f"{path}: can't be read after line {number}: {error}") from error


def _bad_line(path: Path, opener: Callable[..., Any], number: int) -> int:
    """The first line that is not UTF-8; the decoder reads ahead, so ``number`` is only a lower bound."""
    with opener(path, "rb") as binary:
        for number, line in enumerate(binary, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def _jsonl(path: Path) -> Iterator[Row]:
    return _json_lines(_lines(path), path)


def _json_lines(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Row]:
    name, decode = str(path), json.JSONDecoder().decode
    for number, line in lines:
        if not line or line.isspace():
            continue
        try:
            values = decode(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _malformed(path, number, line, error) from error
        if not isinstance(values, dict):
            hint = "; a file that is one JSON array is named .json" if isinstance(values, list) else ""
            raise UserError(f"{path}:{number}: expected a JSON object, found {named_type(values)}{hint}")
        yield Row(values, name, number)


def _malformed(path: Path, number: int, line: str, error: Exception) -> UserError:
    column = getattr(error, "colno", 1)
    shown = line[max(0, column - 31) : column + 30]
    reason = f"{error.msg} at column {column}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
    return UserError(f"{path}:{number}: malformed JSON: {reason}: …{shown}…")


def _json(path: Path) -> Iterator[Row]:
    """A JSON array of objects, an object that holds one such array, or in truth JSON Lines."""
    text = "\n".join(line for _, line in _lines(path))
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(enumerate(text.split("\n"), 1), path)
            return
        number = getattr(error, "lineno", 1)
        line = text.split("\n")[number - 1] if text else ""
        raise _malformed(path, number, line, error) from error
    if isinstance(values, dict):
        values = _only_table(values, path)
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a JSON array of objects, found {named_type(values)}")
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number}: expected an object, found {named_type(row)}")
        yield Row(row, str(path), number)


def _only_table(values: dict[str, Any], path: Path) -> list[Any]:
    tables = [key for key, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    conversation = {"messages", "conversations"} & set(tables)
    if len(tables) == 1 and not conversation:
        return list(values[tables[0]])
    if len(tables) > 1:
        raise UserError(f"{path}: holds several tables ({', '.join(tables)}); give a file with one array of objects")
    return [values]  # one row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    # Line ends inside quotes belong to the text, so the csv module gets lines with their ends.
    lines = (line + "\n" for _, line in _lines(path))
    first = next(lines, "")
    delimiter = "\t" if kind(path) == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    name = str(path)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: a column name is used twice: {', '.join(header)}")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields)), name, line)
            elif fields:
                raise UserError(f"{path}:{line}: {len(fields)} fields, but the header names {len(header)} columns")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: malformed CSV: {error}") from error


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, str(path), number)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


def _text(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line and not line.isspace():
            yield Row({"text": line}, str(path), number)


def read_text(path: str | Path) -> str:
    """The whole text of a ``.txt(.gz)`` file, blank lines included: what perplexity of running text is taken over."""
    path = Path(path)
    if not path.is_file():
        raise missing_file(path)
    return "\n".join(line for _, line in _lines(path))


def named_type(value: Any) -> str:
    """A JSON value's type in words, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


TEXT = (".txt", ".text")
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
    ".text": _text,
}
