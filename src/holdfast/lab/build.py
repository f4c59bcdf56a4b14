"""``holdfast lab build``: train the lab's tokenizer and pretrain its model, the same bytes every time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.files import new_folder, write_json
from holdfast.lab.corpus import corpus
from holdfast.lab.known_truth import instructions
from holdfast.lab.tasks import TASKS, examples
from holdfast.lab.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100  # label of a token without loss


@dataclass(frozen=True)
class Pretraining:
    """How the packaged model is made; written beside it as ``recipe.json``."""

    vocabulary: int = 3072
    width: int = 160
    layers: int = 3
    heads: int = 4
    feed_forward: int = 432
    positions: int = 256
    block: int = 128  # tokens per training sequence
    batch: int = 12  # blocks per step
    steps: int = 1200
    learning_rate: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.01
    seed: int = 0
    threads: int = 1  # the order of sums depends on it; one gives the same bytes whatever the number of cores


def build(out: Path, recipe: Pretraining | None = None) -> Path:
    """Write tokenizer, model and ``recipe.json`` to the folder ``out``; returns it.

    Deterministic: the same recipe on the same kind of CPU and the same versions gives the same bytes.
    Cost: about four minutes on 2 cores.
    """
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    recipe = recipe or Pretraining()
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        tokenizer = train_tokenizer(tokenizer_text(), recipe.vocabulary)
        blocks = pack(corpus("train"), tokenizer, recipe.block)
        set_seed(recipe.seed)
        model = LlamaForCausalLM(_config(recipe, tokenizer))
        with new_folder(out) as folder:
            arguments = TrainingArguments(
                output_dir=str(folder / "trainer"),
                max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch,
                learning_rate=recipe.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=recipe.warmup,
                weight_decay=recipe.weight_decay,
                adam_beta2=0.98,
                max_grad_norm=1.0,
                seed=recipe.seed,
                logging_steps=100,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            Trainer(model=model, args=arguments, train_dataset=blocks).train()
            _save(model, tokenizer, recipe, folder)
    finally:
        torch.set_num_threads(threads)
    return out


def pack(passages: Iterator[str], tokenizer: PreTrainedTokenizerFast, block: int) -> Dataset:
    """Whole passages, each closed by the end token, put into blocks one after another; the rest is padding, no loss.

    Every block starts with a passage, so that the model also learns texts that nothing precedes.
    A passage longer than a block is cut.
    """
    from datasets import Dataset

    rows: list[list[int]] = [[]]
    for tokens in tokenizer(list(passages))["input_ids"]:
        piece = [*tokens[: block - 1], tokenizer.eos_token_id]
        if len(rows[-1]) + len(piece) > block:
            rows.append([])
        rows[-1].extend(piece)
    fill = [block - len(row) for row in rows]
    return Dataset.from_dict(
        {
            "input_ids": [row + [tokenizer.pad_token_id] * n for row, n in zip(rows, fill)],
            "labels": [row + [IGNORED] * n for row, n in zip(rows, fill)],
        }
    )


def tokenizer_text() -> Iterator[str]:
    """The corpus once, and what the model will be tuned on, so that those words are few tokens too."""
    yield from corpus("train")
    for task in TASKS:
        for prompt, completion in examples(task, "train"):
            yield prompt + completion
    for row in instructions(400):
        yield row["prompt"] + row["completion"]


def _config(recipe: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Pretraining, folder: Path) -> None:
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    model.config.use_cache = True  # the Trainer turns it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "recipe.json", asdict(recipe))
