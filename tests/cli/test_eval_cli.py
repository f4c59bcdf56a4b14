"""holdfast eval: results folder, local data, cache and messages."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
from typer.testing import CliRunner

from holdfast import lab
from holdfast.cli import build
from holdfast.errors import UserError
from holdfast.evaluate.command import cache_folder

RUN = CliRunner()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def local_data(folder: Path) -> Path:
    row = {"question": "Which is wet?", "choices": ["sea", "sand", "sun", "stone"], "answer": 0}
    write(folder / "bench" / "mmlu_test.jsonl.gz", [{"subject": s, **row} for s in ("law", "art") for _ in range(6)])
    write(folder / "bench" / "mmlu_dev.jsonl.gz", [{"subject": s, **row} for s in ("law", "art") for _ in range(5)])
    copa = {
        "premise": "The sea was wild.",
        "question": "effect",
        "choices": ["They stayed.", "They swam."],
        "answer": 0,
    }
    write(folder / "bench" / "copa_dev.jsonl.gz", [copa] * 8)
    return folder


def test_eval_on_local_files(tmp_path: Path) -> None:
    data, out = local_data(tmp_path / "data"), tmp_path / "out"
    arguments = ["eval", str(lab.model_dir()), "--panel", "paper1", "--local-data", str(data), "--limit", "4"]
    arguments += ["--cache", str(tmp_path / "cache")]
    found = RUN.invoke(build(), [*arguments, "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "no data for: race_middle" in found.output
    items = pd.read_parquet(out / "items.parquet")
    assert list(items.groupby("task", sort=False).size()) == [4, 4]
    assert set(items[items["task"] == "mmlu"]["group"]) == {"law", "art"}
    about = json.loads((out / "summary.json").read_text())
    assert (about["panel"], about["limit"], [task["n"] for task in about["tasks"]]) == ("paper1", 4, [4, 4])
    assert "| mmlu | acc |" in (out / "summary.md").read_text()
    assert len(list((tmp_path / "cache").glob("*.parquet"))) == 2


def test_wrong_input_names_what_is_valid(tmp_path: Path) -> None:
    for arguments, message in [
        (["eval", "lab", "--panel", "quik"], "Did you mean 'quick'?"),
        (["eval", "lab", "--panel", "quick", "--local-data", str(tmp_path / "none")], "no such folder"),
        (["eval", "lab", "--panel", "quick", "--local-data", str(tmp_path)], "Looked for hellaswag_validation"),
    ]:
        found = RUN.invoke(build(), arguments)
        assert isinstance(found.exception, UserError), found.output
        assert message in str(found.exception)


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    write(tmp_path / "copa_dev.jsonl.gz", [{"premise": "x", "question": "why", "choices": ["a", "b"], "answer": 0}])
    found = RUN.invoke(build(), ["eval", "lab", "--panel", "quick", "--local-data", str(tmp_path)])
    assert isinstance(found.exception, UserError)
    assert "copa, row 1" in str(found.exception)


def test_the_cache_folder_can_be_chosen(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HOLDFAST_SCORES", str(tmp_path))
    assert cache_folder() == tmp_path
