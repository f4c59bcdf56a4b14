"""``holdfast landscape`` end to end on a tiny model, and its messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.cli import main
from holdfast.landscape import Surface

WORDS = ["[unk]", "[end]", "[pad]", *["one", "two", "three", "four", "five", "six", "plus", "is"]]


def model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, eos_token_id=1, pad_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[unk]", eos_token="[end]", pad_token="[pad]"
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    model(folder / "base"), model(folder / "a", 1), model(folder / "b", 2)
    rows = [{"q": "one plus two is", "a": "three"}, {"q": "two plus two is", "a": "four"}]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def command(world: Path, *more: str, out: str) -> list[str]:
    data = ["--data", str(world / "sums.jsonl"), "--prompt", "{q}", "--completion", " {a}"]
    return ["landscape", str(world / "base"), *data, "--grid", "5", "--out", str(world / out), *more]


def test_random_planes_with_sharpness(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, "--seeds", "2", "--range", "0.1", "--rho", "0.1", "--picture", "svg", out="planes")) == 0
    shown = capsys.readouterr().out
    for word in ("SC (%), 2 random planes", "MAG", "worst rise", "95 % interval", "contour.svg"):
        assert word in shown
    first, second = (Surface.load(world / "planes" / f"surface-{seed}.json") for seed in (0, 1))
    assert first.grid.shape == (5, 5)
    assert first.centre == second.centre == first.grid[2, 2]
    assert first.meta["tokens"] == 4  # two answers and two ends
    # again: every point is already there
    points = sorted((world / "planes" / "points").glob("*/points-0.jsonl"))
    sizes = [path.stat().st_size for path in points]
    assert main(command(world, "--seeds", "2", "--range", "0.1", "--picture", "", out="planes")) == 0
    assert [len(path.read_text().split()) for path in points] == [25, 25]
    assert all(path.stat().st_size <= size + 1 for path, size in zip(points, sizes))


def test_a_plane_and_a_line_through_checkpoints(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = ["--checkpoint", str(world / "a"), "--checkpoint", str(world / "b")]
    assert main(command(world, "--directions", "plane", *ends, "--picture", "svg", out="plane")) == 0
    assert "random" not in capsys.readouterr().out
    surface = Surface.load(world / "plane" / "surface.json")
    assert [mark.label for mark in surface.marks] == ["base", "a", "b"]
    assert main(command(world, "--line", *ends[:2], out="line")) == 0
    assert "loss barrier" in capsys.readouterr().out
    assert len(json.loads((world / "line" / "landscape.json").read_text())["line"]["losses"]) == 5


def test_one_plane_is_called_an_anecdote(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, "--seeds", "1", "--picture", "", out="one")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "anecdote" in shown and "none: one plane" in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--directions", "gausian"], "gaussian"),
        (["--directions", "plane"], "2 --checkpoint"),
        (["--line"], "1 --checkpoint"),
        (["--grid", "4"], "odd"),
        (["--picture", "gif"], "gif"),
        (["--seeds", "0"], "at least 1"),
        (["--scope", "some"], "trainable"),
        (["--compute", "int8"], "bfloat16"),
        (["--memory", "disk"], "stored"),
        (["--range", "-1"], "positive"),
    ],
)
def test_mistakes_cost_one_clear_message(
    more: list[str], words: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(world, *more, out="wrong")) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (world / "wrong").exists()
