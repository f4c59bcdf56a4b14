"""The decomposition on lm-eval's own sample files, for models that were evaluated elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.diagnose.decomposition import ROLES, Decomposition, decompose_benchmarks
from holdfast.errors import UserError, did_you_mean

NAME = re.compile(r"samples_(?P<task>.+?)(?:_(?P<time>\d{4}-\d\d-\d\dT[\d\-:.]+))?\.jsonl$")
USUAL = ("acc", "exact_match", "acc_norm", "pass@1", "f1")  # the metric taken when none is named, in this order


@dataclass(frozen=True)
class Samples:
    """One task's per-item scores by document id, and the hash of each document where lm-eval wrote one."""

    scores: dict[int, float]
    hashes: dict[int, str]


def read_samples(source: str | Path, metric: str | None = None, filter_name: str | None = None) -> dict[str, Samples]:
    """Scores by task from a ``samples_<task>_<time>.jsonl`` file or a folder of them (the newest of each task).

    ``metric`` is a column of the file (default: the first of acc, exact_match, acc_norm, pass@1, f1 that is there);
    ``filter_name`` picks one of lm-eval's answer filters (default: the first in the file).
    Raises UserError, with the file and line, for anything unreadable or a metric that isn't there.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of lm-eval samples")
    files = sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]
    newest: dict[str, tuple[str, Path]] = {}
    for file in files:
        found = NAME.search(file.name)
        task, time = (found["task"], found["time"] or "") if found else (file.stem, "")
        if task not in newest or time > newest[task][0]:
            newest[task] = (time, file)
    if not newest:
        raise UserError(f"{path}: no samples_*.jsonl in this folder (lm-eval writes them with --log_samples)")
    return {task: _read(file, metric, filter_name) for task, (_, file) in sorted(newest.items())}


def _read(file: Path, metric: str | None, filter_name: str | None) -> Samples:
    scores: dict[int, float] = {}
    hashes: dict[int, str] = {}
    filters: list[str] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _row(line, f"{file}:{number}")
            name = str(row.get("filter", "none"))
            if name not in filters:
                filters.append(name)
            if name != (filter_name or filters[0]):
                continue
            metric = metric or _metric(row, f"{file}:{number}")
            if not isinstance(row.get(metric), (int, float)):
                have = [key for key in row.get("metrics", row) if isinstance(row.get(key), (int, float))]
                raise UserError(f"{file}:{number}: no number under '{metric}'.{did_you_mean(metric, have)}")
            scores[int(row["doc_id"])] = float(row[metric])
            hashes[int(row["doc_id"])] = str(row.get("doc_hash", ""))
    if filter_name is not None and filter_name not in filters:
        raise UserError(f"{file}: no filter '{filter_name}'.{did_you_mean(filter_name, filters)}")
    if not scores:
        raise UserError(f"{file}: no samples in this file")
    return Samples(scores, hashes)


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or "doc_id" not in row:
        raise UserError(f"{place}: not a sample of lm-eval: it has no doc_id")
    return row


def _metric(row: Mapping[str, Any], place: str) -> str:
    for name in (*USUAL, *row.get("metrics", ())):
        if isinstance(row.get(name), (int, float)):
            return str(name)
    raise UserError(f"{place}: no per-item metric; name one (of {', '.join(map(str, row))})")


def decompose_samples(
    base: str | Path,
    tuned: str | Path,
    restored: str | Path,
    control: str | Path | None = None,
    *,
    metric: str | None = None,
    filter_name: str | None = None,
    **settings: Any,
) -> dict[str, Decomposition]:
    """``decompose_benchmarks`` on the tasks that all sample files share; further ``settings`` are its own.

    Items are matched by document id; ids or documents that differ between the models are an error, because then the
    intervals would not be paired.
    """
    sources = {role: source for role, source in zip(ROLES, (base, tuned, restored, control)) if source is not None}
    read = {role: read_samples(source, metric, filter_name) for role, source in sources.items()}
    shared = set.intersection(*(set(tasks) for tasks in read.values()))
    if not shared:
        raise UserError(
            "the sample folders have no task in common: " + "; ".join(f"{r}: {list(t)}" for r, t in read.items())
        )
    arrays = {}
    for task in sorted(shared):
        ids = sorted(read["base"][task].scores)
        for role, tasks in read.items():
            _check_same(task, role, read["base"][task], tasks[task])
        arrays[task] = {role: [tasks[task].scores[id_] for id_ in ids] for role, tasks in read.items()}
    return decompose_benchmarks(arrays, **settings)


def _check_same(task: str, role: str, base: Samples, other: Samples) -> None:
    differ = set(base.scores) ^ set(other.scores)
    if differ:
        raise UserError(f"{task}: base and {role} answered different items ({len(differ)} ids are in one of them only)")
    changed = [id_ for id_, hash_ in base.hashes.items() if other.hashes[id_] != hash_]
    if changed:
        raise UserError(f"{task}: document {changed[0]} is another question for {role} than for base")
