"""The engine against plain references: HFLM, one-by-one scoring, and transformers' own generate."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
)

from holdfast import lab
from holdfast.evaluate import EvalTask, Item, PrefixSharingLM, measure, summarize
from holdfast.evaluate import generate as generate_module
from holdfast.evaluate.engine import Engine
from holdfast.evaluate.generate import generate_texts
from holdfast.evaluate.tree import Question

WORDS = [
    *("the", "sea", "was", "calm", "and", "a", "small", "boat", "came", "home"),
    *("with", "fish", "before", "night", "fell", "over", "the", "old", "town"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(lab.model_dir())


@pytest.fixture(scope="module")
def lab_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lab.model_dir()).eval()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": lambda v: LlamaConfig(vocab_size=v, num_key_value_heads=2, max_position_embeddings=256, **SMALL),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "mistral, window 6": lambda v: MistralConfig(
        vocab_size=v, num_key_value_heads=2, sliding_window=6, max_position_embeddings=256, **SMALL
    ),
    "gemma2, mixed window 6": lambda v: Gemma2Config(
        vocab_size=v, num_key_value_heads=2, head_dim=8, sliding_window=6, max_position_embeddings=256, **SMALL
    ),
}


def sentence(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


def requests(count: int = 12) -> list[tuple[str, str]]:
    generator = random.Random(1)
    shots = sentence(generator, 40, 40)
    contexts = [f"{shots}\n{sentence(generator, 1, 9)}" if k % 2 else sentence(generator, 1, 15) for k in range(count)]
    choices = [[" " + sentence(generator, 1, 5) for _ in range(3)] for _ in contexts]
    pairs = [(context, choice) for context, three in zip(contexts, choices) for choice in three]
    return [*pairs, ("ends in a space ", "then this"), ("", "no context at all"), pairs[0]]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, k) for k, args in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_same_loglikelihoods_as_hflm(name: str, attention: str, tokenizer: Any) -> None:
    if name.startswith("gemma2") and attention == "sdpa":
        pytest.skip("Gemma 2 caps its attention scores, which sdpa can't")
    torch.manual_seed(0)
    config = CONFIGS[name](len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    asked = instances("loglikelihood", requests())
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(asked, disable_tqdm=True)
    lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer)
    ours = lm.loglikelihood(asked)
    assert lm.engine.forward.packed
    assert [a[0] for a in ours] == pytest.approx([b[0] for b in theirs], abs=1e-4)
    assert [a[1] for a in ours] == [b[1] for b in theirs]


def test_fewer_tokens_are_run_than_plainly(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    seen = []
    handle = lab_model.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(i[0].numel()))
    pairs = requests(24)
    try:
        PrefixSharingLM(pretrained=lab_model, tokenizer=tokenizer).loglikelihood(instances("loglikelihood", pairs))
        ours, seen = sum(seen), []
        HFLM(pretrained=lab_model, tokenizer=tokenizer, batch_size=8).loglikelihood(
            instances("loglikelihood", pairs), disable_tqdm=True
        )
    finally:
        handle.remove()
    assert sum(seen) > 3.5 * ours


def test_rolling_loglikelihood_with_windows(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    generator = random.Random(2)
    texts = [(sentence(generator, low, low),) for low in (3, 31, 32, 33, 150)]
    asked = instances("loglikelihood_rolling", texts)
    theirs = HFLM(pretrained=lab_model, tokenizer=tokenizer, batch_size=2, max_length=32)
    ours = PrefixSharingLM(pretrained=lab_model, tokenizer=tokenizer, max_length=32)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=2e-3)


def test_long_contexts_are_cut_as_hflm_cuts_them(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    generator = random.Random(3)
    pairs = [(sentence(generator, 60, 60), " " + sentence(generator, k, k)) for k in (1, 2, 7)]
    asked = instances("loglikelihood", pairs)
    theirs = HFLM(pretrained=lab_model, tokenizer=tokenizer, batch_size=2, max_length=24)
    ours = PrefixSharingLM(pretrained=lab_model, tokenizer=tokenizer, max_length=24)
    expected = [value for value, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
    assert [value for value, _ in ours.loglikelihood(asked)] == pytest.approx(expected, abs=1e-4)
    assert ours.truncated == 3


@pytest.mark.parametrize(
    ("batch_tokens", "small"),
    [(None, 1 << 30), (24, 1 << 30), (None, 0)],
    ids=["whole prompts", "prompts in pieces", "one at a time"],
)
@pytest.mark.parametrize("name", ["lab", "gpt2", "mistral, window 6"])
def test_generation_token_for_token(
    name: str,
    batch_tokens: int | None,
    small: int,
    lab_model: PreTrainedModel,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate_module, "SMALL", small)
    torch.manual_seed(0)
    model = lab_model if name == "lab" else AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer))).eval()
    generator = random.Random(4)
    shots = sentence(generator, 40, 40)
    prompts = [shots + "\n" + sentence(generator, 1, 12) for _ in range(7)]
    prompts += [sentence(generator, 1, 20) for _ in range(9)]
    batches: list[int] = []
    outputs = generate_texts(
        Engine(model, batch_tokens), tokenizer, prompts, max_new_tokens=14, limit=256, on_item=batches.append
    )
    assert (max(batches) == 1) == (small == 0)  # a large model makes short texts one at a time on a processor
    for prompt, output in zip(prompts, outputs):
        inputs = tokenizer(prompt, return_tensors="pt")
        made = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=torch.ones_like(inputs.input_ids),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[0, inputs.input_ids.shape[1] :].tolist()
        assert list(output.tokens) == [token for token in made if token != tokenizer.eos_token_id]


def test_generate_until_equals_hflms_texts(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    generator = random.Random(5)
    arguments = [
        (sentence(generator, 2, 12), {"until": stops, "max_gen_toks": most, "do_sample": False})
        for stops, most in [(["."], 12), (["\n", " the"], 9), ([], 6), (["e"], 10)] * 3
    ]
    asked = instances("generate_until", arguments)
    theirs = HFLM(pretrained=lab_model, tokenizer=tokenizer, batch_size=4).generate_until(asked, disable_tqdm=True)
    assert PrefixSharingLM(pretrained=lab_model, tokenizer=tokenizer).generate_until(asked) == theirs


class TakesNoMask(torch.nn.Module):
    """A causal LM that ignores block masks and positions, as recurrent models do."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids, use_cache=False)


def test_a_model_without_block_masks_is_scored_without_sharing(lab_model: PreTrainedModel) -> None:
    asked = [Question((1, 2, 3, 4), ((5, 6), (7, 8, 9))), Question((9, 8, 7), ((6, 5, 4),))]
    expected = Engine(lab_model).score(asked)
    engine = Engine(TakesNoMask(lab_model))
    with pytest.warns(UserWarning, match="without shared prefixes"):
        found = engine.score(asked)
    for a, b in zip(found, expected):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_out_of_memory_halves_the_batch(lab_model: PreTrainedModel, tokenizer: Any, monkeypatch: Any) -> None:
    asked = [Question((1, 2, k), ((k, 3), (4, k, 5))) for k in range(40)]
    expected = [score.logprobs for score in Engine(lab_model).score(asked)]
    engine, forward = Engine(lab_model), lab_model.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(lab_model, "forward", small)
    found = [score.logprobs for score in engine.score(asked)]
    assert np.concatenate(found) == pytest.approx(np.concatenate(expected), abs=1e-4)


def tasks() -> list[EvalTask]:
    generator = random.Random(6)
    items = tuple(
        Item(str(k), sentence(generator, 2, 9), tuple(" " + sentence(generator, 1, 3) for _ in range(4)), k % 4)
        for k in range(20)
    )
    made = tuple(Item(str(k), sentence(generator, 1, 6), (), "x") for k in range(8))
    texts = tuple(Item(str(k), sentence(generator, 20, 40)) for k in range(3))
    return [
        EvalTask("choice", "choice", items, chance=25.0),
        EvalTask("made", "generate", made, max_new_tokens=6),
        EvalTask("text", "perplexity", texts),
    ]


def test_measure_leaves_mode_rng_and_grad_mode_as_they_were(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    model = copy.deepcopy(lab_model)
    model.train()
    model.get_input_embeddings().eval()  # a module the user froze in eval mode stays so
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    modes = [module.training for module in model.modules()]
    items = measure(model, tokenizer, tasks())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert len(items) == 31
    assert list(summarize(items)["n"]) == [20, 8, 3]


def test_measure_agrees_with_a_plain_loop(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    choice = tasks()[0]
    items = measure(lab_model, tokenizer, [choice])
    for item, row in zip(choice.items, items.to_dict("records")):
        prompt = tokenizer(item.prompt)["input_ids"]
        sums = []
        for text in item.choices:
            ids = tokenizer(item.prompt + text)["input_ids"]
            with torch.no_grad():
                log = lab_model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(log[k - 1, ids[k]]) for k in range(len(prompt), len(ids))))
        assert row["logprobs"] == pytest.approx(sums, abs=1e-4)
        assert row["choice"] == int(np.argmax(sums))
        # by text: of two equal choices either is right
        assert row["score"] == float(item.choices[int(np.argmax(sums))] == item.choices[int(item.answer or 0)])
        share = np.exp(sums) / np.exp(sums).sum()
        assert row["confidence"] == pytest.approx(share.max(), abs=1e-5)
        assert row["choice_entropy"] == pytest.approx(-(share * np.log(share)).sum(), abs=1e-4)


def test_label_mass_counts_both_forms_of_each_label(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    labels = [w for w in WORDS if len(tokenizer(" " + w, add_special_tokens=False)["input_ids"]) == 1][:2]
    item = Item("0", "the small boat came", tuple(" " + label for label in labels), 0)
    row = measure(lab_model, tokenizer, [EvalTask("t", "choice", (item,))]).iloc[0]
    forms = [tokenizer(f, add_special_tokens=False)["input_ids"] for w in labels for f in (w, " " + w)]
    with torch.no_grad():
        p = lab_model(input_ids=torch.tensor([tokenizer(item.prompt)["input_ids"]])).logits[0, -1].softmax(-1)
    expected = sum(float(p[i]) for i in {form[0] for form in forms if len(form) == 1})
    assert row["label_mass"] == pytest.approx(expected, rel=1e-4)
    assert row["vocab_entropy"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


def test_sliding_windows_predict_every_token_once_with_more_context(lab_model: PreTrainedModel, tokenizer: Any) -> None:
    text = EvalTask("text", "perplexity", (Item("0", sentence(random.Random(8), 700, 700)),))
    disjoint, sliding = measure(lab_model, tokenizer, [text]), measure(lab_model, tokenizer, [text], stride=32)
    assert disjoint["weight"][0] == sliding["weight"][0] == len(tokenizer(text.items[0].prompt)["input_ids"])
    assert disjoint["score"][0] != sliding["score"][0]


def test_fewer_logits_at_once_change_nothing(lab_model: PreTrainedModel) -> None:
    asked = [Question((5, 6, 7 + n), ((8, 9, 10, 11 + n), (12, 13), (14 + n, 15, 16))) for n in range(9)]
    plain, frugal = Engine(lab_model), Engine(lab_model)
    frugal.head_rows, frugal.head_values = 3, 1
    for a, b in zip(plain.score(asked), frugal.score(asked), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5) and a.hits == b.hits
