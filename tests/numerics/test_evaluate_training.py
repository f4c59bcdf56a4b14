"""Training with evaluation on equals training with evaluation off, bit for bit; the time budget holds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from holdfast import lab
from holdfast.evaluate import EvalTask, EvaluateEvery, Item

WORDS = ["the", "sea", "was", "calm", "and", "a", "small", "boat", "came", "home"]


def tasks() -> list[EvalTask]:
    generator = random.Random(0)
    prompt = [" ".join(generator.choices(WORDS, k=5)) for _ in range(40)]
    return [
        EvalTask("choice", "choice", tuple(Item(str(k), p, (" sea", " boat"), k % 2) for k, p in enumerate(prompt))),
        EvalTask(
            "made", "generate", tuple(Item(str(k), p, (), "x") for k, p in enumerate(prompt[:4])), max_new_tokens=4
        ),
        EvalTask("text", "perplexity", tuple(Item(str(k), p) for k, p in enumerate(prompt[:4]))),
    ]


def train(out: Path, tokenizer: Any, callbacks: list[Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        attention_dropout=0.3,
    )
    model = LlamaForCausalLM(config)
    rows = [tokenizer(" ".join(random.Random(k).choices(WORDS, k=8)))["input_ids"][:8] for k in range(24)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = TrainingArguments(
        str(out),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        neftune_noise_alpha=5.0,  # random numbers in every step: an RNG that moved would show
    )
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab.model_dir())
    logged: list[dict[str, float]] = []
    callback = EvaluateEvery(tasks(), tokenizer, steps=2, log=logged.append)
    without, with_evaluation = train(tmp_path, tokenizer, []), train(tmp_path, tokenizer, [callback])
    assert without.keys() == with_evaluation.keys()
    assert all(torch.equal(without[name], with_evaluation[name]) for name in without)
    assert [step for step, _ in callback.history] == [0, 2, 4, 6]
    assert set(logged[0]) == {"panel/choice", "panel/made", "panel/text"}
    assert logged[0]["panel/text"] != logged[-1]["panel/text"]
    assert list(callback.summary()["step"]) == [0] * 3 + [2] * 3 + [4] * 3 + [6] * 3


def test_the_time_budget_picks_items_once(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab.model_dir())
    callback = EvaluateEvery(tasks(), tokenizer, steps=3, seconds=1e-6)
    train(tmp_path, tokenizer, [callback])
    asked = [list(zip(items["task"], items["item"])) for _, items in callback.history]
    assert len(asked) == 3
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 16 + 4 + 4  # the first block of every task, and no more
