"""Perplexity and restoring on a tiny random model, against plain loops."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.diagnose.memorization import count_tokens, exact_memorization
from holdfast.diagnose.ranking import PerplexityScorer, perplexity
from holdfast.diagnose.restoring import RestoreSettings, blocks, restore
from holdfast.errors import UserError

WORDS = ["<s>", "</s>", "<unk>", *(f"w{index}" for index in range(40))]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def texts(count: int, seed: int = 0) -> list[str]:
    """A language in which every word is followed by the next number."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 40, (count, 2), generator=generator).tolist()
    return [" ".join(f"w{(start + step) % 40}" for step in range(3 + size % 9)) for start, size in starts]


def plain_nats(net: LlamaForCausalLM, text: str, most: int) -> tuple[float, int]:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"][:most]
    total = 0.0
    with torch.no_grad():
        for position, token in enumerate(ids):
            logits = net(torch.tensor([[0, *ids[:position]]])).logits[0, -1].double()
            total -= float(torch.log_softmax(logits, dim=-1)[token])
    return total, len(ids)


def test_perplexity_of_padded_batches_is_that_of_one_token_at_a_time():
    net = model()
    net.train()
    given = [*texts(20), "", "w1"]
    scorer = PerplexityScorer(net, tokenizer(), max_tokens=8)
    scorer.batch_tokens = 24
    found = scorer(given)
    assert net.training  # left as it was
    net.eval()
    for text, (nats, tokens) in zip(given, found):
        expected, count = plain_nats(net, text, 8)
        assert tokens == count
        assert nats == pytest.approx(expected, abs=1e-4)
    total = sum(nats for nats, _ in found) / sum(tokens for _, tokens in found)
    assert perplexity(scorer, given) == pytest.approx(math.exp(total), rel=1e-6)
    with pytest.raises(UserError, match="no tokens"):
        perplexity(scorer, [""])


def test_blocks_hold_every_token_once_in_shuffled_order():
    given = texts(15)
    rows = blocks(tokenizer(), given, 6, seed=3)
    stream = [
        token
        for row in rows
        for token, label, seen in zip(row["input_ids"], row["labels"], row["attention_mask"])
        if seen and label == token
    ]
    expected = sorted(tokenizer()(text, add_special_tokens=False)["input_ids"] + [1] for text in given)
    split: list[list[int]] = [[]]
    for token in stream:
        split[-1].append(token)
        if token == 1:
            split.append([])
    assert sorted(split[:-1]) == expected
    assert split[:-1] != [tokenizer()(text, add_special_tokens=False)["input_ids"] + [1] for text in given]
    assert all(len(row["input_ids"]) == 6 for row in rows)
    assert all(label == -100 for row in rows for label, seen in zip(row["labels"], row["attention_mask"]) if not seen)


def test_restoring_lowers_the_probe_perplexity_and_is_repeatable():
    settings = RestoreSettings(learning_rate=3e-3, batch_size=4, max_length=32, probes=3)
    held_out = texts(30, seed=1)

    def run() -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
        net = model()
        found = restore(
            net,
            tokenizer(),
            texts(200),
            settings,
            probe=lambda m: perplexity(PerplexityScorer(m, tokenizer()), held_out),
        )
        assert not found.model.training
        return found.trajectory, found.model.state_dict()

    trajectory, weights = run()
    again, same = run()
    assert trajectory == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert trajectory[0][0] == 0.0 and trajectory[-1][0] == 1.0 and len(trajectory) >= 4
    assert trajectory[-1][1] < 0.7 * trajectory[0][1]


def test_probing_on_the_way_changes_nothing():
    settings = RestoreSettings(learning_rate=1e-3, batch_size=4, max_length=32)
    with_probe, without = (
        restore(model(), tokenizer(), texts(60), settings, probe=probe).model.state_dict()
        for probe in (lambda m: perplexity(PerplexityScorer(m, tokenizer()), texts(5)), None)
    )
    assert all(torch.equal(with_probe[name], without[name]) for name in without)


def test_batches_are_accumulated_to_the_same_step():
    """A window of four parts gives the step of one batch: the mean over all its tokens."""
    import holdfast.diagnose.restoring as module

    results = []
    for limit in (4096, 40):
        original, module.MICRO_TOKENS = module.MICRO_TOKENS, limit
        try:
            settings = RestoreSettings(learning_rate=1e-3, batch_size=4, max_length=32)
            results.append(restore(model(), tokenizer(), texts(60), settings).model.state_dict())
        finally:
            module.MICRO_TOKENS = original
    assert all(torch.allclose(results[0][name], results[1][name], atol=2e-5) for name in results[0])


def test_methods_act_in_restoring():
    from holdfast.methods import METHODS

    settings = RestoreSettings(learning_rate=1e-3, batch_size=4, max_length=32)
    start = model().state_dict()
    plain = restore(model(), tokenizer(), texts(60), settings).model.state_dict()
    pulled = restore(
        model(),
        tokenizer(),
        texts(60),
        settings,
        methods=[METHODS["wiseft"](alpha=0.5)],  # type: ignore[call-arg]
    ).model.state_dict()
    for name, weight in pulled.items():
        assert torch.allclose(weight, (start[name] + plain[name]) / 2, atol=1e-6), name


def test_bad_settings_and_empty_text():
    with pytest.raises(UserError, match="learning rate"):
        RestoreSettings(learning_rate=0)
    with pytest.raises(UserError, match="batch_size"):
        RestoreSettings(batch_size=0)
    with pytest.raises(UserError, match="no tokens"):
        restore(model(), tokenizer(), [])


def plain_memorization(net: LlamaForCausalLM, rows: list[tuple[str, str]]) -> float:
    hits = total = 0
    for prompt, completion in rows:
        start = len(tokenizer()(prompt)["input_ids"])
        ids = tokenizer()(prompt + completion)["input_ids"]
        for position in range(max(1, start), len(ids)):
            with torch.no_grad():
                logits = net(torch.tensor([ids[:position]])).logits[0, -1]
            hits += int(logits.argmax()) == ids[position]
            total += 1
    return hits / total


def test_memorization_counts_answer_tokens_that_are_the_argmax():
    rows = [("w1 w2 w3", " w4 w5"), ("w7", " w8 w9 w10 w11"), ("", "w1 w2"), ("w3 w3 w3 w3 w3 w3", " w3")] * 5
    data = Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]})
    net = model()
    restore(net, tokenizer(), texts(200), RestoreSettings(learning_rate=3e-3, batch_size=4, max_length=32))
    found = exact_memorization(net, tokenizer(), data)
    assert 0 < found < 1
    assert found == pytest.approx(plain_memorization(net, rows), abs=1e-9)
    assert count_tokens(data, tokenizer()) == sum(len((p + c).split()) for p, c in rows)


def test_memorization_takes_text_and_messages_and_names_missing_columns():
    net = model()
    text = Dataset.from_dict({"text": ["w1 w2 w3", "w4 w5"]})
    assert exact_memorization(net, tokenizer(), text) == pytest.approx(
        plain_memorization(net, [("", "w1 w2 w3"), ("", "w4 w5")])
    )
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    messages = Dataset.from_dict({"messages": [chat]})
    assert exact_memorization(net, tokenizer(), messages) == pytest.approx(
        plain_memorization(net, [("w1 w2", "\nw3 w4")])
    )
    with pytest.raises(UserError, match="its columns are label"):
        exact_memorization(net, tokenizer(), Dataset.from_dict({"label": [1]}))
