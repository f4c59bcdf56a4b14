"""Fisher files against plain per-example gradients, and the Pareto plane of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.errors import UserError
from holdfast.merge import compute_fisher, evaluate_sweep, fisher, merge_checkpoints, processes, save_fisher
from holdfast.merge.pareto import front

WORDS = ["<pad>", "<eos>", "a", "b", "c", "d"]


def tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    return LlamaForCausalLM(config).eval(), tokenizer


def test_the_fisher_file_holds_mean_squared_gradients_and_feeds_a_merge(tmp_path):
    model, tokenizer = tiny()
    data = Dataset.from_dict({"prompt": ["a b", "c", "d a b"], "completion": [" c", " d d", " a"]})
    values = compute_fisher(model, tokenizer, data, samples=3)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for prompt, completion in zip(data["prompt"], data["completion"]):
        start = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([start + tokenizer(completion)["input_ids"] + [1]])  # the answer ends with <eos>
        log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        gradients = torch.autograd.grad(log_p[len(start) - 1 :].sum(), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), gradients):
            expected[name] += gradient.square() / 3
    assert values.keys() == expected.keys()
    assert all(torch.allclose(values[n], expected[n], rtol=1e-4, atol=1e-9) for n in values)
    path = save_fisher(tmp_path / "fisher.safetensors", values, {"kind": "empirical", "samples": 3})
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["holdfast"] == "holdfast-fisher-1" and json.loads(metadata["about"])["samples"] == 3
    model.save_pretrained(tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == set(load_file(path))
    merge_checkpoints("fisher", [tmp_path / "model"] * 2, tmp_path / "out", fisher=[path, path])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[n], t) for n, t in load_file(tmp_path / "model" / "model.safetensors").items())


@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_normalized_fishers_of_files_are_those_of_memory(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(processes, "can_fork", lambda: workers == "processes")
    generator = torch.Generator().manual_seed(1)
    inputs = [{n: torch.rand(400, 300, generator=generator) for n in "vw"} for _ in range(4)]
    for i, tensors in enumerate(inputs):
        (tmp_path / f"{i}").mkdir()
        save_file(tensors, tmp_path / f"{i}" / "model.safetensors")
    fishers = [tmp_path / f"{i}" / "model.safetensors" for i in (2, 3)]
    merge_checkpoints("fisher", [tmp_path / "0", tmp_path / "1"], tmp_path / "out", fisher=fishers, normalize=True)
    expected = fisher(inputs[:2], inputs[2:], normalize=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in "vw")
    plain = fisher(inputs[:2], inputs[2:])
    assert not torch.equal(merged["v"], plain["v"])


def test_kinds_are_named():
    model, tokenizer = tiny()
    data = Dataset.from_dict({"text": ["a b c", "b c d"]})
    empirical, true, batch = (compute_fisher(model, tokenizer, data, kind=k) for k in ("empirical", "true", "batch"))
    assert not torch.allclose(empirical["model.embed_tokens.weight"], true["model.embed_tokens.weight"])
    assert not torch.allclose(empirical["model.embed_tokens.weight"], batch["model.embed_tokens.weight"])
    with pytest.raises(UserError, match="Did you mean 'empirical'"):
        compute_fisher(model, tokenizer, data, kind="empiricl")  # type: ignore[arg-type]


def test_the_front_is_what_nothing_beats():
    points = {"a": (1.0, 5.0), "b": (3.0, 3.0), "c": (2.0, 3.0), "d": (5.0, 1.0), "e": (3.0, 3.0)}
    assert front(points) == ["a", "b", "d", "e"]


def test_a_sweep_is_scored_and_drawn(tmp_path):
    for name, value in (("old", 0.0), ("new", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    result = merge_checkpoints(
        "wise_ft", [tmp_path / "new"], tmp_path / "out", tmp_path / "old", sweep={"beta": [0.0, 0.5, 1.0]}
    )

    def score(folder: Path) -> pd.DataFrame:
        w = float(load_file(folder / "model.safetensors")["w"])
        columns = {"task": ["first", "second", "text"], "metric": ["acc", "acc", "perplexity"]}
        return pd.DataFrame({**columns, "value": [100 - 80 * w**2, 20 + 60 * w, 9 + w]})

    table = evaluate_sweep(result, score)
    assert table.loc["beta=0.5", "first"] == 80 and table.loc["beta=0.5", "second"] == 50
    assert table["front"].tolist() == [True, True, True]
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["axes"] == ["second", "first"] and record["scores"]["beta=1"]["first"] == 100
    assert "Pareto front" in (tmp_path / "out" / "pareto.html").read_text()
    assert len((tmp_path / "out" / "pareto.csv").read_text().splitlines()) == 4
    table = evaluate_sweep(result, score, axes=("first", "text"))
    assert table["front"].tolist() == [False, False, True]  # lower perplexity and higher accuracy: the old model
    with pytest.raises(UserError, match="Did you mean 'first'"):
        evaluate_sweep(result, score, axes=("frst", "text"))
