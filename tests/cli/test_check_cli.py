"""holdfast check: exit codes, reports, and both kinds of sources."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from holdfast import lab
from holdfast.cli import build
from holdfast.evaluate.store import save_results

RUN = CliRunner()


def results(folder: Path, score: np.ndarray, about: dict[str, object] | None = None) -> Path:
    items = pd.DataFrame(
        {
            "task": "planted",
            "item": [str(k) for k in range(len(score))],
            "group": "",
            "metric": "acc",
            "score": score,
            "weight": 1.0,
            "prediction": "",
            "error": "",
            "truncated": 0,
            "chance": 25.0,
        }
    )
    save_results(folder, items, about or {"panel": "planted"})
    return folder


def planted(n: int, lost: int, won: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    before = (generator.random(n) < 0.6).astype(float)
    after = before.copy()
    after[generator.choice(np.flatnonzero(before == 1), lost, replace=False)] = 0.0
    after[generator.choice(np.flatnonzero(before == 0), won, replace=False)] = 1.0
    return before, after


@pytest.mark.parametrize(("lost", "won"), [(30, 0), (40, 10)])
def test_a_planted_3_point_drop_on_1000_items_fails(tmp_path: Path, lost: int, won: int) -> None:
    before, after = planted(1000, lost, won)
    one, two = results(tmp_path / "a", before), results(tmp_path / "b", after)
    report, suite = tmp_path / "gate.md", tmp_path / "gate.xml"
    options = ["--max-drop", "1.0", "--markdown", str(report), "--junit", str(suite)]
    found = RUN.invoke(build(), ["check", str(one), str(two), *options])
    assert found.exit_code == 1, found.output
    assert "planted lost 3.00 points" in found.output
    assert "| planted (acc) | 1000 |" in report.read_text()
    assert ElementTree.parse(suite).getroot().get("failures") == "1"


def test_identical_results_pass(tmp_path: Path) -> None:
    before, _ = planted(1000, 0, 0)
    one, two = results(tmp_path / "a", before), results(tmp_path / "b", before)
    found = RUN.invoke(build(), ["check", str(one), str(two)])
    assert found.exit_code == 0, found.output
    assert "every drop is within 1 points" in found.output


def test_an_identical_model_passes_and_results_stand_for_a_model(tmp_path: Path) -> None:
    model, cache = str(lab.model_dir()), ["--cache", str(tmp_path / "cache")]
    options = ["--panel", "lab", "--limit", "20", *cache]
    found = RUN.invoke(build(), ["eval", model, *options, "--out", str(tmp_path / "before")])
    assert found.exit_code == 0, found.output
    again = RUN.invoke(build(), ["check", str(tmp_path / "before"), model, *cache])
    assert again.exit_code == 0, again.output
    both = RUN.invoke(build(), ["check", model, model, *options])
    assert both.exit_code == 0, both.output


def test_too_small_a_panel_says_so_and_strict_fails(tmp_path: Path) -> None:
    before, after = planted(60, 1, 0)
    one, two = results(tmp_path / "a", before), results(tmp_path / "b", after)
    found = RUN.invoke(build(), ["check", str(one), str(two)])
    assert found.exit_code == 0
    assert "60 items are too few for a budget of 1" in found.output
    assert RUN.invoke(build(), ["check", str(one), str(two), "--strict"]).exit_code == 1


def test_lm_eval_sample_logs_are_read(tmp_path: Path) -> None:
    before, after = planted(500, 40, 5)
    for name, scores in (("a", before), ("b", after)):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        lines = [
            json.dumps(
                {"doc_id": k, "doc_hash": f"{k:064d}", "metrics": ["acc", "acc_norm"], "acc": s, "acc_norm": 0.0}
            )
            for k, s in enumerate(scores)
        ]
        (folder / "samples_arc_easy_2026-01-02T03-04-05.678.jsonl").write_text("\n".join(lines) + "\n")
    found = RUN.invoke(build(), ["check", str(tmp_path / "a"), str(tmp_path / "b"), "--max-drop", "2"])
    assert found.exit_code == 1, found.output
    assert "arc_easy lost 7.00 points" in found.output


def test_wrong_input_is_one_message(tmp_path: Path) -> None:
    from holdfast.errors import UserError

    before, after = planted(50, 1, 0)
    one, two = results(tmp_path / "a", before), results(tmp_path / "b", after[:40])
    found = RUN.invoke(build(), ["check", str(one), str(two)])
    assert isinstance(found.exception, UserError)
    assert "one side only" in str(found.exception)
    found = RUN.invoke(build(), ["check", str(one), str(lab.model_dir()), "--panel", "lab"])
    assert isinstance(found.exception, UserError)
    assert "planted" in str(found.exception)
