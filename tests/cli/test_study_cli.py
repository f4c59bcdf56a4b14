"""The command line of studies: exit codes, and one clear message for each kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from holdfast.cli import main

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def to_file(recipe: dict[str, Any]) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return str(path)

    return to_file


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the command; it must exit with 2 and one message on stderr that is no traceback."""
    assert main(list(words)) == 2
    text = capsys.readouterr().err
    assert text.startswith("holdfast: ") and "Traceback" not in text
    return text


class TestBadInput:
    def test_unknown_key_and_method(self, capsys: Any, write: Any, tiny_recipe: Recipe) -> None:
        assert "Did you mean 'tasks'?" in complaint(capsys, "run", write({**tiny_recipe(), "taks": []}))
        assert "Did you mean 'sfa'?" in complaint(capsys, "run", write(tiny_recipe(arms={"a": ["sfaa"]})))

    @pytest.mark.parametrize(
        ("entry", "expected"),
        [({"sfa": {"p": 0}}, "p"), ({"sfa": {"p": 1.2}}, "p"), ({"rehearsal": {"share": -0.1}}, "share")],
    )
    def test_values_outside_their_range(
        self, capsys: Any, write: Any, tiny_recipe: Recipe, entry: dict[str, Any], expected: str
    ) -> None:
        text = complaint(capsys, "run", write(tiny_recipe(arms={"a": [entry]})))
        assert expected in text and "arms.a" in text

    def test_missing_file(self, capsys: Any, write: Any, tiny_recipe: Recipe) -> None:
        recipe = tiny_recipe()
        recipe["tasks"][0]["train"] += "x"
        text = complaint(capsys, "run", write(recipe))
        assert "tasks.echo" in text and "echo_train.jsonl" in text

    def test_malformed_json_line(self, capsys: Any, write: Any, tiny_recipe: Recipe, tmp_path: Path) -> None:
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"prompt": "a", "completion": " b"}\n{"prompt": "a", \n')
        recipe = tiny_recipe()
        recipe["tasks"][0]["train"] = str(broken)
        assert "broken.jsonl:2" in complaint(capsys, "run", write(recipe))

    def test_missing_column_names_those_present(self, capsys: Any, write: Any, tiny_recipe: Recipe) -> None:
        recipe = tiny_recipe()
        recipe["tasks"][0]["prompt"] = "Q: {qestion}"
        recipe["tasks"][0]["completion"] = "{completion}"
        text = complaint(capsys, "run", write(recipe))
        assert "qestion" in text and "prompt" in text and "completion" in text

    def test_training_and_testing_on_the_same_rows(self, capsys: Any, write: Any, tiny_recipe: Recipe) -> None:
        recipe = tiny_recipe()
        recipe["tasks"][0]["test"] = recipe["tasks"][0]["train"]
        assert "same rows" in complaint(capsys, "plan", write(recipe))
        recipe["tasks"][0] |= {"train_split": "[:90%]", "test_split": "[90%:]"}
        assert main(["plan", write(recipe)]) == 0

    def test_empty_data_set(self, capsys: Any, write: Any, tiny_recipe: Recipe, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text("\n")
        recipe = tiny_recipe()
        recipe["tasks"][0]["train"] = str(tmp_path / "empty.jsonl")
        assert "empty" in complaint(capsys, "run", write(recipe))

    def test_prompt_longer_than_max_length(self, capsys: Any, write: Any, tiny_recipe: Recipe) -> None:
        recipe = tiny_recipe()
        recipe["training"]["max_length"] = 6
        text = complaint(capsys, "run", write(recipe))
        assert "max_length" in text and "echo_train.jsonl:1" in text

    def test_model_folder_without_weights(
        self, capsys: Any, write: Any, tiny_recipe: Recipe, tiny_model: Path, tmp_path: Path
    ) -> None:
        bare = tmp_path / "bare"
        shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        text = complaint(capsys, "run", write(tiny_recipe(model=str(bare))))
        assert "without weights" in text and str(bare) in text

    def test_directory_of_another_recipe(self, capsys: Any, write: Any, tiny_recipe: Recipe, tmp_path: Path) -> None:
        out = tmp_path / "run"
        out.mkdir()
        (out / "recipe.yaml").write_text(Path(write(tiny_recipe(model="lab"))).read_text())
        text = complaint(capsys, "run", write(tiny_recipe()), "--out", str(out))
        assert "different recipe" in text and "'model' was \"lab\"" in text

    def test_a_training_setting_that_trl_refuses(
        self, capsys: Any, write: Any, tiny_recipe: Recipe, tmp_path: Path
    ) -> None:
        recipe = tiny_recipe()
        recipe["training"]["lr_scheduler_type"] = "cosin"
        text = complaint(capsys, "run", write(recipe), "--out", str(tmp_path / "run"))
        assert "training" in text and "cosin" in text

    def test_words_that_are_no_overrides(self, capsys: Any) -> None:
        assert "key=value" in complaint(capsys, "run", "quickstart", "seeds")
        assert "Did you mean 'run'" in complaint(capsys, "rum")

    def test_report_without_a_study(self, capsys: Any, tmp_path: Path) -> None:
        assert "no finished study" in complaint(capsys, "report", str(tmp_path))


def test_disk_full_while_saving_leaves_no_checkpoint(
    capsys: Any, write: Any, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from transformers import PreTrainedModel

    def full(self: Any, folder: str, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "run"
    recipe = write(tiny_recipe(arms={"sequential": []}))
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        assert "disk is full" in complaint(capsys, "run", recipe, "--out", str(out), "--quiet")
    assert not list((out / "steps").glob("train-*"))
    assert main(["run", recipe, "--out", str(out), "--quiet"]) == 0
    assert len(list((out / "steps").glob("train-*"))) == 2


def test_run_report_plan_list_and_init(
    capsys: Any, write: Any, tiny_recipe: Recipe, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipe, out = write(tiny_recipe()), tmp_path / "run"
    assert main(["plan", recipe]) == 0
    planned = capsys.readouterr().out
    assert "6 trainings" in planned and "to run" in planned and "sam(ρ=0.05)" in planned
    assert main(["run", recipe, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "forgetting" in shown and "wiseft" in shown and "6 trainings" in shown
    page = (out / "report.html").read_text()
    assert "Forgetting matrices" in page and "<script src=" not in page
    assert main(["plan", recipe, "--out", str(out)]) == 0
    assert "to run" not in capsys.readouterr().out
    assert main(["report", str(out), "--html", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").exists()
    assert main(["list"]) == 0
    assert "quickstart" in capsys.readouterr().out
    new = tmp_path / "mine.yaml"
    files = ["--train", f"echo={tiny_data / 'echo_train.jsonl'}", "--test", str(tiny_data / "echo_test.jsonl")]
    assert main(["init", str(new), *files]) == 0
    from holdfast.recipe import load_recipe

    assert load_recipe(new).tasks[0].name == "echo"
    assert "exists" in complaint(capsys, "init", str(new))


def test_names_in_reports_are_escaped(tiny_recipe: Recipe) -> None:
    from holdfast.report import report_html

    evil = "<script>alert(1)</script>"
    score = {"value": 50.0, "low": 40.0, "high": 60.0, "n": 10, "metric": "acc"}
    data = {
        "name": evil,
        "recipe": {"model": evil, "name": evil},
        "environment": {
            "holdfast": "0",
            "python": "3",
            "versions": {},
            "cpus": 1,
            "memory_gib": 1,
            "accelerators": [evil],
        },
        "seeds": [0],
        "tasks": [{"name": evil, "metric": "acc", "items": 1, "chance": 0}],
        "panel": [],
        "data": {evil: {"rows": 1, "hash": "", "notes": [evil]}},
        "base": {evil: score},
        "arms": {
            evil: {
                "train": "sequential",
                "methods": [],
                "0": {
                    "checkpoints": [{"after": evil, "step": "a", "scores": {evil: score}}],
                    "seconds": 1,
                    "trainings": ["a"],
                },
            }
        },
        "steps": {"a": {"kind": "train", "tasks": [evil], "history": [{"step": 1, "loss": 1.0}]}},
    }
    page = report_html(data)
    page = page[page.index("<body>") :]
    assert "<script>alert" not in page and "alert(1)" in page


@pytest.mark.slow
def test_killed_and_run_again_equals_uninterrupted(write: Any, tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Three SIGKILLs at different moments; the demo gets ten of them in benchmarks/kill_resume.py."""
    recipe = write(tiny_recipe(arms={"sequential": [], "sfa": [{"sfa": {"p": 0.25}}]}))
    outs = [tmp_path / "whole", tmp_path / "killed"]
    commands = [[sys.executable, "-m", "holdfast", "run", recipe, "--quiet", "--out", str(out)] for out in outs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(commands[0], check=True, env=environment)
    for progress in (1, 3, 5):
        process = subprocess.Popen(commands[1], env=environment)
        while process.poll() is None and len(list((outs[1]).glob("*/*[!.]"))) < progress:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(commands[1], check=True, env=environment)
    items = [pd.read_parquet(out / "items.parquet") for out in outs]
    pd.testing.assert_frame_equal(items[0], items[1])
    scores = [
        {arm: entry["0"]["checkpoints"] for arm, entry in json.loads((out / "study.json").read_text())["arms"].items()}
        for out in outs
    ]
    assert scores[0] == scores[1]
