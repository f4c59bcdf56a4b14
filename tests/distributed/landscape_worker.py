"""Run by torchrun: scans a tiny model on every rank in each of three ways and writes rank 0's results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    # an odd vocabulary and odd heads: shards of different size, some cut through a block
    config = LlamaConfig(vocab_size=61, hidden_size=12, intermediate_size=21, num_hidden_layers=2,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 9), (3, 7), (1, 11))  # an odd number of batches of different token counts
    made = [torch.randint(0, 61, shape, generator=generator) for shape in shapes]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in made]


def local(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach().clone()


def wrapped(how: str) -> nn.Module:
    made: nn.Module = model()
    if how == "ddp":
        made = nn.parallel.DistributedDataParallel(made)
    elif how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in made.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(made, mesh=mesh)
    return made


def measure(how: str, split: str, cache: str | None) -> dict[str, object]:
    from holdfast.landscape import curvature, sharpness, surface

    found: dict[str, object] = {}
    scanned = wrapped(how)
    before = [local(p) for p in scanned.parameters()]
    for kind in ("gaussian", "filter"):
        for memory in ("stored", "regenerated"):
            made = surface(scanned, batches(), grid=3, range=0.05, directions=kind, memory=memory, split=split,
                           seed=3, cache=cache)  # fmt: skip
            found[f"{kind}-{memory}"] = made.grid.tolist()
            found[f"{kind}-norms"] = [*made.meta["norms"], made.meta["cosine"], made.meta["weights_norm"]]
            if made.centre != made.grid[1, 1]:
                raise AssertionError("the centre is not the grid's")
    rise = sharpness(scanned, batches(), rho=0.1, steps=2, directions=2, split=split)
    found["sharpness"] = [rise.worst, rise.gradient_norm, *rise.average.values]
    if split == "auto" and how != "ddp":
        top = curvature(scanned, batches(), eigenvalues=1, iterations=10, probes=1, split=split)
        found["eigenvalue"] = list(top.eigenvalues)
    after = [local(p) for p in scanned.parameters()]
    found["restored"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return found


def main() -> None:
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {}
    for how, split in (("plain", "data"), ("ddp", "auto"), ("fsdp2", "auto")):
        results[f"{how}/{split}"] = measure(how, split, str(out / f"cache-{how}-{split}"))
    answers: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, results)
    if dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps({"results": results, "equal": answers[0] == answers[1]}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
