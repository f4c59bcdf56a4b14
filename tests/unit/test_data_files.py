"""Reading files: every kind, every way in which one can be wrong, with file and line in the message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast.data import raw_rows, read_examples, read_text
from holdfast.errors import UserError

ROWS = [
    {"prompt": "Zwei plus zwei?", "completion": " vier"},
    {"prompt": 'a, b; "c"\n\u2028ü 😀', "completion": " {x}"},  # a line separator that is not a line end
    {"prompt": "", "completion": "\t"},
]


def lines(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    header = delimiter.join(rows[0])
    path.write_text("\n".join([header, *(delimiter.join(map(quoted, row.values())) for row in rows)]) + "\n")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "a.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "a.ndjson": lambda path, rows: path.write_bytes(lines(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "a.jsonl.bz2": lambda path, rows: path.write_bytes(bz2.compress(lines(rows))),
    "a.jsonl.xz": lambda path, rows: path.write_bytes(lzma.compress(lines(rows))),
    "no_last_newline.jsonl": lambda path, rows: path.write_bytes(lines(rows)[:-1]),
    "windows.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows, "\r\n")),
    "blank_lines.jsonl": lambda path, rows: path.write_bytes(b"\n  \n" + lines(rows, "\n\n\n")),
    "utf16.jsonl": lambda path, rows: path.write_bytes(lines(rows).decode().encode("utf-16")),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "a.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "wrapped.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "data": rows})),
    "in_truth_lines.json": lambda path, rows: path.write_bytes(lines(rows)),
    "a.csv": write_csv,
    "semicolons.csv": lambda path, rows: write_csv(path, rows, ";"),
    "a.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    assert raw_rows(tmp_path / name) == ROWS
    dataset = read_examples(tmp_path / name)
    assert dataset.column_names == ["prompt", "completion"]
    assert dataset.to_list() == ROWS


def test_text_is_a_row_a_line_without_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"\n = Title = \n \n one\x0c two \r\nlast"))
    assert raw_rows(path) == [{"text": " = Title = "}, {"text": " one\x0c two "}, {"text": "last"}]
    assert read_text(path) == "\n = Title = \n \n one\x0c two \nlast"
    with pytest.raises(UserError, match=r"b\.txt.*Did you mean 'a\.txt\.gz'"):
        read_text(tmp_path / "b.txt")


def test_one_object_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert raw_rows(tmp_path / "a.json") == [row]


BAD = {  # name -> content, expected message
    "broken.jsonl": (b'{"a": 1}\n\n{"a": 1,}\n', r"broken\.jsonl:3: malformed JSON: .* at column 9"),
    "list.jsonl": (b"[1, 2]\n", r"list\.jsonl:1: expected a JSON object, found a list; .* named \.json"),
    "deep.jsonl": (b'{"a": ' + b"[" * 200_000 + b"}", r"deep\.jsonl:1: malformed JSON: nested too deep"),
    "latin.jsonl": (b'{"a": 1}\n{"a": "\xfc"}\n', r"latin\.jsonl:2: not UTF-8"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS) * 1000)[:-30], r"cut\.jsonl\.gz: can't be read after line"),
    "plain.jsonl.gz": (lines(ROWS), r"plain\.jsonl\.gz: can't be read"),
    "broken.json": (b'[\n{"a": 1},\n{"a" 2}\n]', r"broken\.json:3: malformed JSON"),
    "number.json": (b"3", r"number\.json: expected a JSON array of objects, found a number"),
    "mixed.json": (b'[{"a": 1}, "b"]', r"mixed\.json: row 2: expected an object, found text"),
    "two.json": (b'{"a": [{"x": 1}], "b": [{"x": 1}]}', r"two\.json: holds several tables \(a, b\)"),
    "empty.json": (b"", r"empty\.json:1: malformed JSON"),
    "no_rows.json": (b"[]", r"no_rows\.json: no rows"),
    "fields.csv": (b'a,b\n1,2\n"x\ny",4\n1\n', r"fields\.csv:5: 1 fields, but the header names 2 columns"),
    "twice.csv": (b"a,a\n1,2\n", r"twice\.csv:1: a column name is used twice: a, a"),
    "quote.csv": (b'a,b\n1,"2" x\n', r"quote\.csv:2: malformed CSV"),
    "empty.jsonl": (b"\n\n", r"empty\.jsonl: no rows"),
    "header.csv": (b"a,b\n", r"header\.csv: no rows"),
    "empty.txt": (b"", r"empty\.txt: no rows"),
    "no.parquet": (b"PAR1", r"no\.parquet: not a readable Parquet file"),
    "a.xlsx": (b"", r"a\.xlsx: unknown kind of data file '\.xlsx'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        raw_rows(tmp_path / name)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file or folder\. Did you mean 'train\.jsonl'"):
        read_examples(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"no such file or folder"):
        read_examples(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[1:]))
    write_parquet(tmp_path / "a.parquet", ROWS[:1])
    (tmp_path / "LICENSE.txt").write_text("do what you want")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("nonsense")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.jsonl").write_text("nonsense")
    assert raw_rows(tmp_path) == ROWS


def test_a_folder_with_splits_gives_the_split(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}-00000.jsonl").write_bytes(lines(rows))
    assert raw_rows(tmp_path, split="train") == ROWS
    assert raw_rows(tmp_path, split="test") == ROWS[:1]
    assert len(raw_rows(tmp_path)) == 4


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no data files .* It holds: image\.png"):
        raw_rows(tmp_path)


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    whole = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    whole.save_to_disk(tmp_path / "dict")
    whole["test"].save_to_disk(tmp_path / "one")
    assert raw_rows(tmp_path / "dict") == ROWS
    assert raw_rows(tmp_path / "dict", split="test") == ROWS[:1]
    assert raw_rows(tmp_path / "one") == ROWS[:1]
    with pytest.raises(UserError, match=r"no split 'dev'; there are: train, test"):
        raw_rows(tmp_path / "dict", split="dev")


def test_a_hub_data_set_that_cannot_be_had_is_one_message() -> None:
    with pytest.raises(UserError, match=r"someone/something:config: no such file here, .*split 'test'"):
        read_examples("someone/something:config", split="test")


def test_fifty_thousand_rows_are_quick(tmp_path: Path) -> None:
    row = {"instruction": "Sum up this text. " * 8, "input": "word " * 40, "output": "short " * 20}
    path = tmp_path / "big.jsonl"
    path.write_bytes(lines([row]) * 50_000)
    begin = time.process_time()
    assert len(read_examples(path)) == 50_000
    assert time.process_time() - begin < 6  # about 1 s; a busy machine gets room
