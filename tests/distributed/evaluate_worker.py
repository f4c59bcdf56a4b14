"""Run by torchrun: measures on every rank in each of three ways, then trains a step, and writes rank 0's results."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from holdfast import lab
from holdfast.evaluate import EvalTask, Item, measure

WORDS = ["the", "sea", "was", "calm", "and", "a", "small", "boat", "came", "home"]


def tasks() -> list[EvalTask]:
    """Odd counts, and a long shared prefix that only some items have: the ranks' work is unequal on purpose."""
    draw = random.Random(0)
    some = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(7)]
    shots = " ".join(draw.choices(WORDS, k=40))
    prompts = [f"{shots}\n{text}" if k < 4 else text for k, text in enumerate(some)]
    return [
        EvalTask("choice", "choice", tuple(Item(str(k), p, (" sea", " boat came"), 0) for k, p in enumerate(prompts))),
        EvalTask("made", "generate", tuple(Item(str(k), p, (), "x") for k, p in enumerate(some[:5])), max_new_tokens=5),
        EvalTask("text", "perplexity", tuple(Item(str(k), p) for k, p in enumerate(some[:3]))),
        EvalTask("one", "choice", (Item("0", "the sea", (" was", " a"), 1),)),  # nothing for the first rank
    ]


def model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def wrapped(how: str, made: Any) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(made)
    if how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in made.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(made, mesh=mesh)
    return made


def run(how: str, tokenizer: Any) -> dict[str, Any]:
    ready = wrapped(how, model(len(tokenizer))).train()
    items = measure(ready, tokenizer, tasks())
    ids = torch.arange(10)[None]
    (ready.module if how == "ddp" else ready)(input_ids=ids, labels=ids).loss.backward()
    assert all(module.training for module in ready.modules())
    torch.optim.SGD(ready.parameters(), lr=0.5).step()  # a later measurement must see the new weights
    later = measure(ready, tokenizer, tasks()[:1])
    return {
        "later": [value for value in later["logprobs"].tolist() if isinstance(value, list)],
        "items": list(zip(items["task"], items["item"])),
        "score": items["score"].tolist(),
        "text": items["text"].dropna().tolist(),
        "logprobs": [value for value in items["logprobs"].tolist() if isinstance(value, list)],
    }


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab.model_dir())
    if len(sys.argv) > 2:
        dist.init_process_group("gloo")
        found = {how: run(how, tokenizer) for how in ("plain", "ddp", "fsdp2")}
        rank = dist.get_rank()
        dist.destroy_process_group()
    else:
        found, rank = {"plain": run("plain", tokenizer)}, 0
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
