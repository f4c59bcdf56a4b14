"""Where a panel's rows come from: files below a folder, or the hub."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import UserError
from holdfast.evaluate.tasks import Item

Row = dict[str, Any]
Hub = tuple[str, str | None, str]  # data set, configuration, split
SUFFIXES = (".jsonl.gz", ".jsonl", ".txt.gz", ".txt")


def sample_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """``limit`` items, evenly over groups, drawn by seed, in their first order."""
    groups: dict[str, list[int]] = {}
    for k, item in enumerate(items):
        groups.setdefault(item.group, []).append(k)
    generator = random.Random(seed)
    queues = [generator.sample(members, len(members)) for members in groups.values()]
    chosen: list[int] = []
    while len(chosen) < min(limit, len(items)):
        for queue in queues:
            if queue and len(chosen) < limit:
                chosen.append(queue.pop())
    return [items[k] for k in sorted(chosen)]


def find_rows(files: Iterable[str], hub: tuple[str, str | None, str] | None, local: Path | None) -> list[Row] | None:
    """A task's rows: from the first of ``files`` below ``local``, else from the hub; None where there are none."""
    if local is not None:
        for name in files:
            for suffix in SUFFIXES:
                found = sorted(local.rglob(name + suffix))
                if found:
                    return list(read_rows(found[0]))
        return None
    return _hub_rows(hub) if hub else None


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, or the documents of a .txt, gzipped or not; UserError with file and line."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        if ".txt" in path.suffixes:
            yield from _documents(file.read())
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}") from error


def _documents(text: str) -> Iterator[Row]:
    """WikiText articles: a line " = Title = " (one equals sign) begins one."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        title = line.strip()
        if title.startswith("= ") and not title.startswith("= =") and title.endswith(" =") and "".join(lines).strip():
            yield {"text": "".join(lines)}
            lines = []
        lines.append(line)
    if "".join(lines).strip():
        yield {"text": "".join(lines)}


def _hub_rows(hub: Hub) -> list[Row] | None:
    """Rows of a hub data set in the columns the formats expect; None if it can't be reached."""
    from datasets import load_dataset

    name, configuration, split = hub
    try:
        rows = [dict(row) for row in load_dataset(name, configuration, split=split)]
    except Exception:  # no network, renamed, gated: the panel says which entries are missing
        return None
    return [from_hub(row) for row in rows]


def from_hub(row: Row) -> Row:
    """A hub row's columns renamed to those of the formats (choices as a list, the answer as an index)."""
    if isinstance(row.get("choices"), dict):  # ARC, OpenBookQA: {"text": [...], "label": [...]}
        labels = list(row["choices"]["label"])
        answer = labels.index(row["answerKey"])
        return {
            **row,
            "question": row.get("question", row.get("question_stem")),
            "choices": row["choices"]["text"],
            "answer": answer,
        }
    if "endings" in row:  # HellaSwag
        return {
            "context": f"{row['activity_label']}: {row['ctx']}",
            "choices": row["endings"],
            "answer": int(row["label"]),
        }
    if "sol1" in row:  # PIQA
        return {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "answer": row["label"]}
    if "choice1" in row:  # COPA
        return {**row, "choices": [row["choice1"], row["choice2"]], "answer": row["label"]}
    return row
