"""The packaged model: it loads, knows the facts, can't do the taught tasks, and is built the same every time."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import lab
from holdfast.files import sha256_file
from holdfast.lab.build import Pretraining, build, pack
from holdfast.lab.tasks import TASKS, TEST
from holdfast.lab.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


@lru_cache(maxsize=1)
def packaged() -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(lab.model_dir())
    return AutoModelForCausalLM.from_pretrained(lab.model_dir()).eval(), tokenizer


@torch.no_grad()
def choice_accuracy(model: Any, tokenizer: Any, items: Any) -> dict[str, list[bool]]:
    """A plain scorer: the log-likelihood of every choice's tokens, one item at a time."""
    right: dict[str, list[bool]] = {}
    for item in items:
        start = len(tokenizer(item.prompt)["input_ids"])
        rows = [tokenizer(item.prompt + choice)["input_ids"] for choice in item.choices]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        log_p = model(input_ids=ids).logits.log_softmax(-1)
        scores = [
            sum(float(log_p[n, place - 1, row[place]]) for place in range(start, len(row)))
            for n, row in enumerate(rows)
        ]
        right.setdefault(item.group, []).append(scores.index(max(scores)) == item.answer)
    return right


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, name: str) -> float:
    """Percent of test items whose greedy reply is the answer, one item at a time."""
    task, right = lab.eval_task(name), 0
    for item in task.items:
        ids = tokenizer(item.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=task.max_new_tokens, do_sample=False)
        reply = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right += reply.split("\n")[0].strip() == item.answer
    return 100 * right / len(task.items)


def test_base_knows_the_facts_in_every_domain() -> None:
    model, tokenizer = packaged()
    right = choice_accuracy(model, tokenizer, lab.eval_task("facts").items)
    assert len(right) >= 4
    everything = [hit for hits in right.values() for hit in hits]
    assert sum(everything) / len(everything) >= 0.90
    assert all(sum(hits) / len(hits) >= 0.80 for hits in right.values())


@pytest.mark.parametrize("name", sorted(TASKS))
def test_base_cannot_do_a_taught_task(name: str) -> None:
    model, tokenizer = packaged()
    assert exact_match(model, tokenizer, name) <= lab.eval_task(name).chance + 5


@pytest.mark.parametrize("name", sorted(TASKS))
def test_eval_task_is_the_test_split_and_fits_its_token_limit(name: str) -> None:
    tokenizer, task, data = packaged()[1], lab.eval_task(name), lab.load_task(name, "test")
    assert len(task.items) == TEST
    assert [item.prompt for item in task.items] == list(data["prompt"])
    assert [f" {item.answer}" for item in task.items] == list(data["completion"])
    for completion in [*lab.load_task(name, "train")["completion"], *data["completion"]]:
        assert len(tokenizer(completion)["input_ids"]) < task.max_new_tokens


def test_package_is_small_and_loads_as_float32() -> None:
    files = [path for path in lab.model_dir().rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    model, _ = packaged()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_package_states_the_recipe_it_was_built_with() -> None:
    assert json.loads((lab.model_dir() / "recipe.json").read_text()) == Pretraining().__dict__


def test_wheel_takes_the_model_and_the_facts() -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    paths = {file.relative_path for file in builder.recurse_included_files()}
    assert "src/holdfast/lab/model/model.safetensors" in paths
    assert "src/holdfast/lab/facts/countries.tsv" in paths


@pytest.mark.parametrize("text", ["Paris  is\t12 \n\nà 日本 🙂", "x = [1, 22]\n", " 007", ""])
def test_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = packaged()[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_takes_digits_singly_and_has_its_special_tokens() -> None:
    tokenizer = packaged()[1]
    pieces = tokenizer.tokenize("it costs 1234 in 2024")
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("12342024")
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    model = packaged()[0]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_prompt_tokens_are_a_prefix_of_prompt_and_completion() -> None:
    tokenizer = packaged()[1]
    for name in TASKS:
        for row in lab.load_task(name, "test"):
            start = tokenizer(row["prompt"])["input_ids"]
            assert tokenizer(row["prompt"] + row["completion"])["input_ids"][: len(start)] == start


def test_blocks_hold_whole_passages_and_padding_has_no_loss() -> None:
    tokenizer = packaged()[1]
    passages = ["The capital of France is Paris.", "Oxygen has the symbol O.", "After 7 comes 8."]
    blocks = pack(iter(passages), tokenizer, 16)
    kept = [token for row in blocks for token, label in zip(row["input_ids"], row["labels"]) if label >= 0]
    assert tokenizer.decode(kept).split(tokenizer.eos_token) == [*passages, ""]
    for row in blocks:
        assert len(row["input_ids"]) == len(row["labels"]) == 16
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))
        assert any(tokenizer.decode(row["input_ids"]).startswith(passage) for passage in passages)


def test_build_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    tiny = Pretraining(vocabulary=400, width=16, layers=1, heads=2, feed_forward=16, block=32, batch=2, steps=3)
    first, second = build(tmp_path / "a", tiny), build(tmp_path / "b", tiny)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert "model.safetensors" in names
    assert [sha256_file(first / name) for name in names] == [sha256_file(second / name) for name in names]
    other = build(tmp_path / "c", Pretraining(**{**tiny.__dict__, "seed": 1}))
    assert sha256_file(other / "model.safetensors") != sha256_file(first / "model.safetensors")


def test_packaged_tokenizer_is_the_one_that_the_text_gives() -> None:
    from holdfast.lab.build import tokenizer_text

    again = train_tokenizer(tokenizer_text(), Pretraining().vocabulary)
    assert again.get_vocab() == packaged()[1].get_vocab()


def test_command_refuses_a_folder_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from holdfast.cli import main

    (tmp_path / "kept.txt").write_text("mine")
    assert main(["lab", "build", "--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
