"""What data methods do to a training set: counts, evenness, seeds, shortfalls, columns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast import Rehearsal
from holdfast.errors import UserError
from holdfast.method import Memory
from holdfast.methods import General, PseudoRehearsal
from holdfast.methods.mixing import reservoir, split


def rows(name: str, count: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)])


def origins(data: Any) -> Counter[str]:
    return Counter(prompt.rstrip("0123456789") for prompt in data["prompt"])


@pytest.mark.parametrize(("mode", "own", "past"), [("replace", 90, 10), ("add", 100, 11)])
def test_share_is_the_share_of_the_final_set(mode: Any, own: int, past: int) -> None:
    method = Rehearsal(share=0.1, mode=mode)
    mixed = method.data(rows("new", 100), {"a": rows("a", 50), "b": rows("b", 50)})
    counts = origins(mixed)
    assert counts["new"] == own and counts["a"] + counts["b"] == past == sum(method.drawn.values())
    assert abs(counts["a"] - counts["b"]) <= 1
    assert len(set(mixed["prompt"])) == own + past, "drawn without replacement"
    assert method.shortfall == 0


def test_seed_decides_the_draw_and_the_order() -> None:
    task, past = rows("new", 60), {"a": rows("a", 60)}
    first, again, other = (Rehearsal(share=0.2).data(task, Memory(past, seed=s))["prompt"] for s in (1, 1, 2))
    assert first == again != other
    tail = [prompt[0] for prompt in first[-20:]]
    assert "a" in tail and "n" in tail, "past data is shuffled in, not appended"


def test_a_shortfall_is_reported_and_nothing_is_repeated() -> None:
    method = Rehearsal(share=0.5)
    with pytest.warns(UserWarning, match="only 7 exist"):
        mixed = method.data(rows("new", 100), {"a": rows("a", 3), "b": rows("b", 4)})
    assert method.shortfall == 43 and len(mixed) == 100
    assert origins(mixed) == {"new": 93, "a": 3, "b": 4}


def test_a_small_past_task_leaves_its_part_to_the_others() -> None:
    assert split(10, {"a": 2, "b": 50, "c": 50}) == {"a": 2, "b": 4, "c": 4}
    assert split(10, {"a": 50, "b": 50, "c": 50}) == {"a": 3, "b": 3, "c": 4}
    assert split(10, {"a": 50, "b": 50}, {"a": 3, "b": 1}) == {"a": 7, "b": 3}
    assert split(10, {"a": 4, "b": 50}, {"a": 1}) == {"a": 4, "b": 0}


def test_weights_by_task() -> None:
    past = {"a": rows("a", 50), "b": rows("b", 50)}
    method = Rehearsal(share=0.2, weights_by_task={"a": 3, "b": 1})
    assert origins(method.data(rows("new", 100), past)) == {"new": 80, "a": 15, "b": 5}
    with pytest.raises(UserError, match=r"'aa'\. Did you mean|Valid: a, b"):
        Rehearsal(weights_by_task={"aa": 1}).data(rows("new", 10), past)


def test_budget_is_a_reservoir_over_the_stream() -> None:
    past = {"a": rows("a", 40), "b": rows("b", 40)}
    method = Rehearsal(share=0.4, budget=10)
    with pytest.warns(UserWarning, match="only 10 exist"):
        mixed = method.data(rows("new", 50), past)
    assert len(set(mixed["prompt"])) == 50 and sum(method.drawn.values()) == 10
    kept = [reservoir(past, 10, seed, "x") for seed in range(400)]
    mean = sum(len(each["a"]) for each in kept) / 400
    assert abs(mean - 5) < 0.3, "each past example is kept with the same probability"
    assert all(sum(map(len, each.values())) == 10 for each in kept)
    only_a = reservoir({"a": past["a"]}, 10, 3, "x")["a"]
    assert set(reservoir(past, 10, 3, "x")["a"]) <= set(only_a), "later tasks only push examples out"


def test_datasets_without_columns_can_be_mixed() -> None:
    class Plain(torch.utils.data.Dataset):
        def __init__(self, values: list[int]) -> None:
            self.values = values

        def __len__(self) -> int:
            return len(self.values)

        def __getitem__(self, index: int) -> int:
            return self.values[index]

    mixed = Rehearsal(share=0.25).data(Plain(list(range(12))), {"a": Plain([100, 101, 102, 103])})
    values = [mixed[i] for i in range(len(mixed))]
    assert len(values) == 12 and sum(value >= 100 for value in values) == 3 and len(set(values)) == 12


def test_what_can_not_be_mixed_is_refused() -> None:
    with pytest.raises(UserError, match="columns"):
        Rehearsal(share=0.5).data(rows("new", 4), {"a": Dataset.from_list([{"text": "x"}] * 4)})
    with pytest.raises(UserError, match="stream"):
        Rehearsal(share=0.5).data(rows("new", 4).to_iterable_dataset(), {"a": rows("a", 4)})


def test_general_data_takes_the_columns_of_the_task(tmp_path: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": f"general {i}"}) + "\n" for i in range(30)))
    method = General(source=str(source), share=0.2)
    mixed = method.data(rows("new", 50), {})
    general = [row for row in mixed if row["completion"].startswith("general")]
    assert len(general) == 10 and all(row["prompt"] == "" for row in general) and len(mixed) == 50
    plain = Dataset.from_list([{"text": f"t{i}"} for i in range(50)])
    assert sum(text.startswith("general") for text in method.data(plain, {})["text"]) == 10


class Letters:
    """The part of a tokenizer that sampling needs."""

    bos_token_id, eos_token_id, pad_token_id = 1, 1, 0

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(95 + int(token)) for token in row if int(token) > 1) for row in rows]


def tiny_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, max_position_embeddings=16, bos_token_id=1, **size))


def test_pseudo_rehearsal_samples_the_base_once(tmp_path: Path) -> None:
    model = tiny_base()
    memory = Memory({}, seed=4, model=model, tokenizer=Letters(), cache=tmp_path)
    state = torch.get_rng_state()
    first = PseudoRehearsal(share=0.25, max_new_tokens=5).data(rows("new", 20), memory)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    stored = list(tmp_path.glob("samples-*.json"))
    assert len(stored) == 1 and len(json.loads(stored[0].read_text())) == 5
    stored[0].write_text(json.dumps(["cached"] * 5))
    again = PseudoRehearsal(share=0.25, max_new_tokens=5).data(rows("new", 20), memory)
    assert Counter(again["completion"])["cached"] == 5 and Counter(first["prompt"])[""] == 5
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    PseudoRehearsal(share=0.25, max_new_tokens=5).data(rows("new", 20), memory)
    assert len(list(tmp_path.glob("samples-*.json"))) == 2, "another base has samples of its own"


def test_pseudo_rehearsal_follows_the_model_distribution() -> None:
    from holdfast.methods.general import sample_texts

    model = tiny_base()
    texts = sample_texts(model, Letters(), 3000, 1, 1.0, 500, seed=0)
    with torch.no_grad():
        p = model.eval()(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    p = p[2:] / p[2:].sum()  # start and padding tokens give empty texts, which are not kept
    counts = torch.tensor([float(Counter(texts)[chr(95 + token)]) for token in range(2, 12)])
    assert ((counts / 3000 - p).abs() < 4 * (p * (1 - p) / 3000).sqrt()).all()
