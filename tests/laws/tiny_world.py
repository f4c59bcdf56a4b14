"""Tiny random models and data for the laws: made here, in seconds, the same every time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from holdfast import with_methods

VOCAB = 32


def tiny_llama(dropout: float = 0.0, tied: bool = False, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).float()


class Rows(torch.utils.data.Dataset):
    """Random token rows, some positions unsupervised, so that micro-batches differ in supervised tokens."""

    def __init__(self, count: int = 16, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for index in range(count):
            ids = torch.randint(0, VOCAB, (10,), generator=generator)
            labels = ids.clone()
            labels[: 1 + index % 7] = -100
            self.rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def characters() -> Any:
    """A tokenizer whose tokens are the lower-case letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<eos>"
    )


def text_task(count: int = 14, letter: str = "a") -> Any:
    from datasets import Dataset

    rows = [{"prompt": letter * (1 + i % 3), "completion": "bcd"[: 1 + i % 3] * (1 + i % 2)} for i in range(count)]
    return Dataset.from_list(rows)


def train_text(folder: Path | str, methods: Any = (), *, task: Any = None, model: Any = None, **changes: Any) -> Any:
    """As :func:`train`, in TRL's SFTTrainer on text."""
    from trl import SFTConfig, SFTTrainer

    extra = changes.pop("extra", {})
    settings = {"max_length": 32, "bf16": False, "gradient_checkpointing": False}
    plain = arguments(folder).to_dict()
    kept = {
        key: plain[key] for key in ("output_dir", "per_device_train_batch_size", "learning_rate", "use_cpu", "seed")
    }
    common = {"num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    trainer = with_methods(SFTTrainer)(
        model=tiny_llama() if model is None else model,
        args=SFTConfig(**(kept | common | {"disable_tqdm": True} | settings | changes)),
        train_dataset=text_task() if task is None else task,
        processing_class=characters(),
        methods=list(methods),
        **{"memory": {"past": text_task(12, "x")}, **extra},
    )
    trainer.train()
    return trainer


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**(settings | changes))


def train(
    folder: Path | str,
    methods: Any = (),
    *,
    model: Any = None,
    trainer_class: type = Trainer,
    data: Any = None,
    resume: Any = None,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Train and return the trainer; its ``model`` and ``state.log_history`` are what laws compare."""
    trainer = with_methods(trainer_class)(
        model=tiny_llama() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=Rows() if data is None else data,
        methods=list(methods),
        **(extra or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    model = trainer.model if hasattr(trainer, "model") else trainer
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def euclidean(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return float(sum((left[name] - right[name]).square().sum() for name in left) ** 0.5)


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# What the laws on gradients train on: 14 rows, so that the last window is short, past data, and SGD, because Adam
# turns the rounding of tiny gradients into whole steps.
SGD_RUN: dict[str, Any] = {
    "data": Rows(14),
    "learning_rate": 0.1,
    "extra": {
        "memory": {"past": Rows(12, seed=5)},
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}),
    },
}


def train_distributed(folder: Path, methods: Any, on_text: bool, precision: str, **changes: Any) -> Any:
    """A run that one process and two processes can share: rows in order, SGD; on text in TRL's trainer."""
    settings: dict[str, Any] = {"train_sampling_strategy": "sequential", "bf16": precision == "bf16", **changes}
    if on_text:
        optimizer = {"optimizer_cls_and_kwargs": SGD_RUN["extra"]["optimizer_cls_and_kwargs"]}
        return train_text(folder, methods, extra=optimizer, **settings)
    return train(folder, methods, **SGD_RUN, **settings)


def whole_and_resumed(folder: Path, make: Any, step: int, **changes: Any) -> tuple[Any, Any]:
    """An uninterrupted run, and one from its checkpoint at ``step`` that is given a model with other weights."""
    run: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": step,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "extra": {"memory": {"past": Rows(6, seed=5)}},
        "data": Rows(14),
    } | changes
    whole = train(folder, [make()], model=tiny_llama(dropout=0.1), **run)
    other = tiny_llama(dropout=0.1)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(0.5)
    return whole, train(folder, [make()], model=other, resume=str(folder / f"checkpoint-{step}"), **run)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    sys.exit("a library for tests")
