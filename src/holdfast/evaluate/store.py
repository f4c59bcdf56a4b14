"""Results on disk: a folder per evaluation, a cache per task, and lm-eval's sample logs as per-item tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from holdfast.errors import UserError
from holdfast.evaluate.measuring import Progress, measure
from holdfast.evaluate.sandbox import Sandbox
from holdfast.evaluate.summary import summarize
from holdfast.evaluate.tasks import EvalTask
from holdfast.files import digest, new_folder, write_json, write_text

ITEMS, SUMMARY = "items.parquet", "summary.json"
FORMAT = 1  # raise when a score could change for the same weights and task


def model_hash(model: nn.Module) -> str:
    """Short SHA-256 over the names, types and bytes of all parameters and buffers; sharded weights are gathered."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        if not isinstance(full, torch.Tensor):
            continue
        hasher.update(f"{name} {full.dtype} {tuple(full.shape)}".encode())
        hasher.update(full.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def cached_measure(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[EvalTask],
    cache: Path,
    *,
    weights: str | None = None,
    batch_tokens: int | None = None,
    on_item: Progress = None,
    sandbox: Sandbox | None = None,
) -> pd.DataFrame:
    """`measure`, but a task already scored with the same weights, tokenizer and settings is read back.

    The key is (weights hash, task hash, tokenizer, dtype, format): unlike lm-eval's it knows the weights. ``weights``
    saves hashing where the caller knows it.
    """
    settings = {
        "weights": weights or model_hash(model),
        "tokenizer": tokenizer_hash(tokenizer),
        "dtype": str(next(model.parameters()).dtype),
        "format": FORMAT,
    }
    paths = {task.name: cache / f"{digest({**settings, 'task': task.hash()})}.parquet" for task in tasks}
    missing = [task for task in tasks if not paths[task.name].exists()]
    if missing:
        fresh = measure(model, tokenizer, missing, batch_tokens=batch_tokens, on_item=on_item, sandbox=sandbox)
        for task in missing:
            _write_parquet(paths[task.name], fresh[fresh["task"] == task.name])
    return pd.concat([pd.read_parquet(paths[task.name]) for task in tasks], ignore_index=True)


def tokenizer_hash(tokenizer: Any) -> str:
    """Short hash of what decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([state, tokenizer.bos_token_id, tokenizer.eos_token_id])


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    table.to_parquet(temporary, index=False)
    temporary.replace(path)


def save_results(folder: Path, items: pd.DataFrame, about: Mapping[str, Any]) -> pd.DataFrame:
    """Write items.parquet, summary.json and summary.md as one folder that is whole or absent; return the summary."""
    summary = summarize(items)
    with new_folder(folder) as new:
        items.to_parquet(new / ITEMS, index=False)
        write_json(new / SUMMARY, {**about, "tasks": json.loads(summary.to_json(orient="records"))})
        write_text(new / "summary.md", summary_markdown(summary))
    return summary


def summary_markdown(summary: pd.DataFrame) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| task | metric | value | 95 % interval | n | chance | errors | truncated |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in summary.to_dict("records"):
        lines.append(
            f"| {row['task']} | {row['metric']} | {row['value']:.2f} | {row['low']:.2f} – {row['high']:.2f} "
            f"| {row['n']} | {row['chance']:g} | {row['errors']} | {row['truncated']} |"
        )
    return "\n".join(lines) + "\n"


def is_results(path: Path) -> bool:
    """Whether a path holds per-item results: of `holdfast eval`, or lm-eval's --log_samples."""
    return (path.is_dir() and ((path / ITEMS).exists() or bool(_sample_files(path)))) or _is_sample_file(path)


def load_results(path: Path) -> pd.DataFrame:
    """Per-item table of a results folder or of lm-eval sample logs. UserError if there is none."""
    if (path / ITEMS).exists():
        return pd.read_parquet(path / ITEMS)
    files = [path] if _is_sample_file(path) else _sample_files(path)
    if not files:
        raise UserError(f"{path}: no results: expected {ITEMS} of `holdfast eval` or samples_*.jsonl of lm-eval.")
    return pd.concat([read_lm_eval_samples(file) for file in files], ignore_index=True)


def load_about(path: Path) -> dict[str, Any]:
    """What summary.json says about a results folder; empty if there is none."""
    file = path / SUMMARY
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _is_sample_file(path: Path) -> bool:
    return path.is_file() and path.name.startswith("samples_") and path.suffix in (".jsonl", ".json")


def _sample_files(folder: Path) -> list[Path]:
    """The newest sample log of each task below a folder (lm-eval puts a date at the end of the name)."""
    newest: dict[str, Path] = {}
    for file in sorted(folder.rglob("samples_*.jsonl")):
        newest[file.name.rsplit("_", 1)[0]] = file
    return list(newest.values())


def read_lm_eval_samples(path: Path) -> pd.DataFrame:
    """lm-eval's --log_samples file as per-item rows (score from the log's first 0/1-valued metric, acc before others).

    The item is lm-eval's doc_id with the document's hash, so that only equal documents are paired.
    """
    name = path.name.removeprefix("samples_").removesuffix(".jsonl")
    head, _, tail = name.rpartition("_")
    task = head if head and "T" in tail else name
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            metric = _metric(sample)
            identity = str(sample.get("doc_hash", ""))[:12]
            rows.append(
                {
                    "task": task,
                    "item": f"{sample['doc_id']}-{identity}" if identity else str(sample["doc_id"]),
                    "group": "",
                    "metric": metric,
                    "score": float(sample[metric]),
                    "weight": 1.0,
                    "prediction": str(sample.get("filtered_resps", "")),
                    "error": "",
                    "truncated": 0,
                    "chance": float("nan"),
                }
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: no lm-eval sample: {error}") from error
    if not rows:
        raise UserError(f"{path}: no samples.")
    return pd.DataFrame(rows)


def _metric(sample: Mapping[str, Any]) -> str:
    names = [str(name) for name in sample.get("metrics", [])] or ["acc", "exact_match", "acc_norm"]
    usable = [name for name in names if isinstance(sample.get(name), (int, float))]
    if not usable:
        raise KeyError(f"no per-item metric among {', '.join(names)}")
    return "acc" if "acc" in usable else usable[0]
