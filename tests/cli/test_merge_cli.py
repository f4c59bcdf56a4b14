"""``holdfast merge`` and ``holdfast fisher``: arguments, exit codes, and what is not imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.cli import main
from holdfast.cli.merge import parse_sweep
from holdfast.errors import UserError
from holdfast.merge import engine, processes


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in (("base", 0.0), ("a", 1.0), ("b", 3.0)):
        Path(name).mkdir()
        save_file({"w": torch.full((4,), value)}, Path(name) / "model.safetensors")
    return tmp_path


def merged(folder: str) -> list[float]:
    return load_file(Path(folder) / "model.safetensors")["w"].tolist()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("linear a b --out o", 2.0),
        ("linear a b --out o --weight 3,1", 1.5),
        ("linear a b --out o --weight 3 --weight 1 normalize=false", 6.0),
        ("wise_ft b --base base --out o alpha=0.25", 0.75),
        ("wise-ft b --base base --out o beta=0.25", 2.25),
        ("task_arithmetic a b --base base --out o --weight 0.5,0.5", 2.0),
        ("negation a --base base --out o", -1.0),
        ("ties a b --base base --out o density=1 scope=model", 2.0),
        ("dare a b --base base --out o density=1 seed=3", 4.0),
        ("dare_ties a b --base base --out o density=1", 2.0),
        ("slerp a b --out o t=1", 3.0),
    ],
)
def test_methods_and_settings(words, value):
    assert main(["merge", *words.split()]) == 0
    assert merged("o") == [value] * 4


def test_negative_weights_reach_the_formula():
    assert main(["merge", "task_arithmetic", "a", "b", "--base", "base", "--out", "o", "--weight", "1,-1"]) == 0
    assert merged("o") == [-2.0] * 4


def test_a_sweep_in_one_call():
    assert main(["merge", "wise_ft", "b", "--base", "base", "--out", "o", "--sweep", "beta=0:1:0.5"]) == 0
    assert [merged(f"o/beta={beta}") for beta in ("0", "0.5", "1")] == [[3.0] * 4, [1.5] * 4, [0.0] * 4]


def test_sweep_syntax():
    assert parse_sweep("alpha=0:1:0.25") == ("alpha", [0, 0.25, 0.5, 0.75, 1])
    assert parse_sweep("density=0.1,0.2") == ("density", [0.1, 0.2])
    assert parse_sweep("weights=1,0;0.5,0.5") == ("weights", [[1, 0], [0.5, 0.5]])
    assert parse_sweep("scope=tensor,model") == ("scope", ["tensor", "model"])
    for wrong in ("alpha", "alpha=", "alpha=0:1:0", "alpha=1:0:0.1", "weights=x;y"):
        with pytest.raises(UserError, match="expected KEY"):
            parse_sweep(wrong)


def test_dry_run_writes_nothing(capsys):
    assert main(["merge", "ties", "a", "b", "--base", "base", "--out", "o", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in ("density=0.2", "1 merged", "GB on disk", "GB of memory", "2 pass(es)"):
        assert part in text
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "base"]


def test_rerunning_says_so_and_progress_is_silent_without_a_terminal(capsys):
    for expected in ("GB in", "was merged already"):
        assert main(["merge", "linear", "a", "b", "--out", "o"]) == 0
        captured = capsys.readouterr()
        assert expected in captured.out and captured.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiess a b --out o", "Did you mean 'ties'"),
        ("ties a b --out o", "needs the base model"),
        ("linear a nothing --out o", "there is no such file or folder"),
        ("linear a b --out o densty=1", "no setting 'densty'"),
        ("linear a b --out o --weight x", "--weight takes numbers"),
        ("linear a b", "give the output folder"),
        ("linear a b --out a", "exists and is not this merge"),
        ("linear a b --out o --panel lab", "--panel goes with --sweep"),
        ("linear a b --out o --sweep alpha", "expected KEY"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(words, message, capsys):
    assert main(["merge", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not Path("o").exists()


def test_merging_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from holdfast.cli import main\n"
        "code = main(['merge', 'ties', 'a', 'b', '--base', 'base', '--out', 'o'])\n"
        "print(code, sorted({'torch', 'transformers', 'pandas', 'plotly', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_fisher_mistakes(capsys):
    Path("data.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    assert main(["fisher", "a", "--data", "data.jsonl", "--out", "f.safetensors", "--kind", "emprical"]) == 2
    assert "valid: empirical, true, batch" in capsys.readouterr().err
    assert main(["fisher", "a", "--data", "nowhere.jsonl", "--out", "f.safetensors"]) == 2
    assert not Path("f.safetensors").exists()


def test_fisher_files_a_fisher_merge_and_a_measured_sweep_of_real_models(folders: Path, capsys) -> None:
    """From two models to Fisher files, their weighted merge by its formula, and a Pareto plane."""
    import shutil

    from holdfast import lab

    shutil.copytree(lab.model_dir(), "tuned")
    start = load_file(Path(lab.model_dir()) / "model.safetensors")
    torch.manual_seed(0)
    tuned = {name: value + 0.3 * value.std() * torch.randn_like(value) for name, value in start.items()}
    save_file(tuned, "tuned/model.safetensors", metadata={"format": "pt"})
    for model, task, out in (("lab", "lab:math", "f0"), ("tuned", "lab:law", "f1")):
        words = ["fisher", model, "--data", task, "--samples", "3", "--out", f"{out}.safetensors"]
        assert main(words) == 0
    assert "trace" in capsys.readouterr().out
    first, second = load_file("f0.safetensors"), load_file("f1.safetensors")
    folder = str(lab.model_dir())
    assert main(["merge", "fisher", folder, "tuned", "--out", "m", "fisher=f0.safetensors,f1.safetensors"]) == 0
    merged = load_file("m/model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        total = first[name] + second[name]
        expected = (first[name] * start[name] + second[name] * tuned[name]) / total
        seen = total > 1e-12  # elsewhere the Fisher says nothing
        assert seen.any()
        torch.testing.assert_close(merged[name][seen], expected[seen], rtol=1e-4, atol=1e-6)
    words = ["merge", "wise_ft", "tuned", "--base", folder, "--out", "s", "--sweep", "beta=0:1:0.5"]
    assert main([*words, "--panel", "lab", "--limit", "4", "--axes", "facts,text"]) == 0
    table = (folders / "s" / "pareto.csv").read_text().splitlines()
    assert len(table) == 4 and (folders / "s" / "pareto.html").exists()
    scores = json.loads((folders / "s" / "sweep.json").read_text())
    assert scores


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_killed_worker_is_one_clear_line_and_running_again_finishes(monkeypatch, capsys):
    for name, value in (("base", 0.0), ("a", 1.0), ("b", 3.0)):
        save_file({f"w{n}": torch.full((4,), value + n) for n in range(6)}, Path(name) / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "can_fork", lambda: True)
        patch.setattr(engine, "hashing", lambda path: lambda scratch: os.kill(os.getpid(), signal.SIGKILL))
        assert main(["merge", "linear", "a", "b", "--out", "o"]) == 2
    said = capsys.readouterr().err
    assert "a worker process was killed" in said and "Traceback" not in said
    assert not Path("o").exists()
    assert main(["merge", "linear", "a", "b", "--out", "o"]) == 0
    assert load_file("o/model.safetensors")["w3"].tolist() == [5.0] * 4
