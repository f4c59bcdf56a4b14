"""What many tests need: a very small model folder and a two-task study on it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama with a byte-level tokenizer, saved as a normal model folder (about 60k parameters)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small instruction tasks and some plain text as files."""
    folder = tmp_path_factory.mktemp("data")
    letters = "abcdefghij"
    echo = [{"prompt": f"echo {a}{b} =", "completion": f" {a}{b}"} for a in letters for b in letters]
    flip = [{"prompt": f"flip {a}{b} =", "completion": f" {b}{a}"} for a in letters for b in letters]
    for name, rows in (("echo", echo), ("flip", flip)):
        for split, part in (("train", rows[::2]), ("test", rows[1::10])):
            (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "text.txt").write_text(
        "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen jugs.\n"
    )
    return folder


@pytest.fixture
def tiny_recipe(tiny_model: Path, tiny_data: Path) -> Callable[..., dict[str, Any]]:
    """A function that returns a fresh recipe mapping; keyword arguments replace keys."""

    def make(**changes: Any) -> dict[str, Any]:
        tasks = [
            {
                "name": name,
                "train": str(tiny_data / f"{name}_train.jsonl"),
                "test": str(tiny_data / f"{name}_test.jsonl"),
                "max_new_tokens": 4,
            }
            for name in ("echo", "flip")
        ]
        recipe = {
            "name": "tiny",
            "model": str(tiny_model),
            "tasks": tasks,
            "panel": [{"name": "text", "test": str(tiny_data / "text.txt"), "metric": "perplexity"}],
            "arms": {
                "sequential": [],
                "rehearsal": [{"rehearsal": {"share": 0.1}}],
                "sam": [{"sam": {"rho": 0.05}}],
                "sfa": [{"sfa": {"p": 0.25}}],
                "wiseft": [{"wiseft": {"alpha": 0.5}}],
                "joint": "joint",
            },
            "training": {"learning_rate": 0.003, "max_steps": 4, "per_device_train_batch_size": 8, "max_length": 32},
        }
        return {**recipe, **changes}

    return make
