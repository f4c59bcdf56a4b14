"""``holdfast diagnose`` and ``holdfast restore`` end to end, on tiny models made here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.cli import main
from holdfast.diagnose.diagnosis import diagnose
from holdfast.diagnose.page import render
from holdfast.diagnose.request import Request
from holdfast.diagnose.restoring import RestoreSettings, restore
from holdfast.errors import UserError
from holdfast.evaluate.tasks import EvalTask, Item
from holdfast.models import load_model, save_model

WORDS = ["<s>", "</s>", "<unk>", *(f"w{index}" for index in range(40)), "Ask", "Reply"]


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def counting(count: int, seed: int, step: int = 1) -> list[str]:
    """The base's language: every word is followed by the next number."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 40, (count, 2), generator=generator).tolist()
    return [" ".join(f"w{(start + k * step) % 40}" for k in range(6 + size % 30)) for start, size in starts]


def trained(folder: Path, texts: list[str], start: Path | None, rate: float, layers: int = 2) -> Path:
    torch.manual_seed(0)
    if start is None:
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        net = LlamaForCausalLM(config)
    else:
        net, _ = load_model(start)
    settings = RestoreSettings(learning_rate=rate, batch_size=16, max_length=32)
    return save_model(restore(net, tokenizer(), texts, settings).model, tokenizer(), folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that can count, one checkpoint that counts in another way, and text to restore with."""
    folder = tmp_path_factory.mktemp("world")
    base = trained(folder / "base", counting(3000, 0), None, 1e-2)
    trained(folder / "shifted", counting(400, 1, step=2), base, 5e-3)
    trained(folder / "other", counting(16, 0), None, 1e-3, layers=1)
    rows = [json.dumps({"text": text}) for text in counting(600, 5)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    return folder


def panel(items: int = 60) -> EvalTask:
    questions = [
        Item(
            f"q{n}",
            f"w{n % 40} w{(n + 1) % 40} w{(n + 2) % 40}",
            (f" w{(n + 3) % 40}", f" w{(n + 4) % 40}", f" w{(n + 9) % 40}"),
            0,
        )
        for n in range(items)
    ]
    return EvalTask("counting", "choice", tuple(questions))


def request(world: Path, *checkpoints: str, **more: object) -> Request:
    settings = {
        "base": str(world / "base"),
        "checkpoints": tuple(str(world / name) for name in checkpoints),
        "corpus": str(world / "corpus.jsonl"),
        "tasks": (panel(),),
        "tokens": 5000,
        "restoring": RestoreSettings(learning_rate=3e-3, batch_size=8, max_length=32, probes=2),
        "tolerance": 0.25,
    }
    return Request(**settings | more)  # type: ignore[arg-type]


def test_a_shift_of_format_is_found_and_nothing_is_done_twice(world, tmp_path):
    said: list[str] = []
    result = diagnose(request(world, "base", "shifted"), tmp_path, say=said.append)
    same, shifted = (point["decomposition"]["pooled"] for point in result["checkpoints"])
    assert same["verdict"] == "none" and "its weights are the base's" in result["warnings"][0]
    assert shifted["verdict"] == "pseudo", shifted
    point = result["checkpoints"][1]
    assert point["tuned"]["perplexity"] > 1.5 * result["base"]["perplexity"]
    assert point["restored"]["perplexity"] < 1.25 * result["base"]["perplexity"]
    assert result["control"]["trajectory"][0][1] == pytest.approx(result["base"]["perplexity"], rel=1e-6)
    assert result["text"]["contamination"]["checked"]
    frame = pd.read_parquet(tmp_path / "items.parquet")
    assert set(frame["role"]) == {"base", "control", "tuned", "restored"} and len(frame) == 6 * 60
    assert sum("restoring" in line for line in said) == 2  # the checkpoint "base" shares the control's restoring
    said.clear()
    again = diagnose(request(world, "base", "shifted"), tmp_path, say=said.append)
    assert said == [] and again == result
    few = EvalTask("few", "choice", panel(20).items)
    more = diagnose(request(world, "shifted", tasks=(panel(), few)), tmp_path, say=said.append)
    assert not any("restoring" in line or "ranking" in line for line in said)
    assert set(more["checkpoints"][0]["decomposition"]) == {"counting", "few", "pooled"}


def test_a_verdict_is_withheld_where_restoring_did_not_work(world, tmp_path):
    weak = RestoreSettings(learning_rate=1e-7, batch_size=8, max_length=32)
    result = diagnose(request(world, "shifted", restoring=weak), tmp_path)
    found = result["checkpoints"][0]["decomposition"]["pooled"]
    assert found["verdict"] == "withheld" and "probe perplexity" in found["reason"]
    assert "No verdict" in result["checkpoints"][0]["advice"]["pooled"][0]


def test_other_architectures_and_tokenizers_are_refused_before_any_work(world, tmp_path):
    with pytest.raises(UserError, match=r"another architecture .*num_hidden_layers 2 and 1"):
        diagnose(request(world, "shifted", "other"), tmp_path)
    model, _ = load_model(world / "shifted")
    moved = [*WORDS[:3], *reversed(WORDS[3:])]
    save_model(model, tokenizer(moved), tmp_path / "moved")
    with pytest.raises(UserError, match=r"another tokenizer .*tokens are missing or have another id"):
        diagnose(request(world, str(tmp_path / "moved")), tmp_path)
    assert not (tmp_path / "ranking").exists()
    save_model(model, tokenizer([*WORDS, "extra"]), tmp_path / "added")
    result = diagnose(request(world, str(tmp_path / "added")), tmp_path / "out")
    assert any("1 tokens that the base does not have" in warning for warning in result["warnings"])


def test_items_with_errors_are_left_out_and_counted(world, tmp_path):
    broken = Item("bad", "w1 w2", (" w3",), 7)
    task = EvalTask("counting", "choice", (*panel(20).items, broken))
    result = diagnose(request(world, "shifted", tasks=(task,)), tmp_path)
    assert result["tasks"][0]["errors"] == 1 and result["checkpoints"][0]["decomposition"]["pooled"]["items"] == 20


def test_bad_requests(world):
    with pytest.raises(UserError, match="no checkpoints"):
        request(world)
    with pytest.raises(UserError, match="right and wrong answers"):
        request(world, "shifted", tasks=(EvalTask("text", "perplexity", (Item("a", "w1 w2"),)),))


def test_the_page_escapes_every_name(world, tmp_path):
    evil = "</script><script>alert(1)</script><b>"
    result = diagnose(request(world, "shifted"), tmp_path)
    result["checkpoints"][0]["name"] = evil
    result["base"]["source"] = evil
    result["warnings"] = [evil]
    result["advice"] = [evil]
    page = render(result, result)
    own = page.split("</style>")[1].split("</script>", 1)[1]  # after Plotly's own code
    assert "<script>alert" not in own and "<b>" not in own
    assert own.count("<script>") == own.count("</script>") == own.count("Plotly.newPlot")
    for title in ("3a.", "3b.", "3c.", "4a.", "6a.", "6c."):
        assert f"<h2>{title}" in own
    assert "http://" not in own and "https://" not in own


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def test_samples_on_the_command_line(tmp_path, capsys):
    for role, right in (("base", 300), ("tuned", 200), ("restored", 299)):
        folder = tmp_path / role
        folder.mkdir()
        rows = [{"doc_id": n, "acc": float(n < right), "metrics": ["acc"]} for n in range(400)]
        (folder / "samples_arc_2025-01-01T00-00-00.0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("diagnose", "--samples", *(tmp_path / role for role in ("base", "tuned", "restored"))) == 0
    out = capsys.readouterr().out
    assert "arc: pseudo" in out and "no control" in out
    assert run("diagnose", "--samples", tmp_path / "base") == 2
    assert "BASE TUNED RESTORED" in capsys.readouterr().err


def test_missing_options_and_methods_are_named(tmp_path, capsys):
    assert run("diagnose", "--base", "x") == 2
    assert "missing: --checkpoints, --corpus, --panel, --out" in capsys.readouterr().err
    common = ("restore", "m", "--base", "b", "--corpus", "c", "--out", tmp_path / "o")
    assert run(*common, "--method", "sfaa p=0.25") == 2
    assert "sfa" in capsys.readouterr().err
    assert run(*common, "--method", "sfa 0.25") == 2
    assert "key=value" in capsys.readouterr().err


def test_restore_on_the_command_line(world, tmp_path, capsys):
    arguments = ("restore", world / "shifted", "--base", world / "base", "--corpus", world / "corpus.jsonl")
    assert run(*arguments, "--out", tmp_path / "restored", "--tokens", 3000, "--lr", "3e-3", "--batch-size", 8) == 0
    account = json.loads((tmp_path / "restored" / "restore.json").read_text())
    assert account["trajectory"][-1][1] < account["trajectory"][0][1]
    assert "probe perplexity" in capsys.readouterr().out
    load_model(tmp_path / "restored")
    assert run(*arguments, "--out", tmp_path / "restored2", "--tokens", "1000000") == 2
    assert "smaller than the budget" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert run(*arguments, "--out", tmp_path / "mine") == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_diagnose_cli import diagnose, request
diagnose(request(Path({world!r}), "base", "shifted"), {out!r}, say=lambda m: print(m, flush=True))
"""


def test_killed_it_continues_to_the_same_numbers(world, tmp_path):
    expected = diagnose(request(world, "base", "shifted"), tmp_path / "whole")
    out = tmp_path / "killed"
    script = KILLED.format(tests=str(Path(__file__).parent), world=str(world), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("restoring shifted") for line in process.stdout)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "diagnosis.json").exists()
    assert diagnose(request(world, "base", "shifted"), out) == expected
