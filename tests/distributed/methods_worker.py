"""Run under torchrun: trains with each method on 2 processes and writes what rank 0 ends with."""

from __future__ import annotations

import gc
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "laws"))
from method_cases import ACTIVE, LONGER, ON_TEXT, RUNS
from tiny_world import losses, same_bits, tiny_llama, train_distributed, weights, whole_and_resumed

SPLIT = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}


def model(kind: str, start: Path) -> Any:
    if kind != "fsdp2":
        return tiny_llama()
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(
        start, distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float32
    )


def run(kind: str, precision: str, out: Path, rank: int) -> None:
    run_name, results = f"{kind}-{precision}", {}
    for name, (methods, on_text) in RUNS.items():
        trainer = train_distributed(
            out / f"{run_name}-{name}", methods(), on_text, precision, model=model(kind, out / "start"), **SPLIT
        )
        final = {key: value.contiguous() for key, value in weights(trainer).items()}
        if rank == 0:
            save_file(final, str(out / f"{run_name}-{name}.safetensors"))
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        results[name] = {"losses": losses(trainer), "history": history}
    if rank == 0:
        (out / f"{run_name}.json").write_text(json.dumps(results))


def resume(out: Path, rank: int) -> None:
    """DDP, from a checkpoint at a random step; models sharded at load time can't be resumed by transformers."""
    results = {}
    for name, make in {**ACTIVE, **LONGER}.items():
        if name not in ON_TEXT:
            step = random.Random(name).randrange(1, 7)
            whole, resumed = whole_and_resumed(
                out / f"resume-{name}", make, step, gradient_accumulation_steps=1, ddp_find_unused_parameters=False
            )
            results[name] = same_bits(weights(whole), weights(resumed)) and losses(whole) == losses(resumed)
    if rank == 0:
        (out / "resume.json").write_text(json.dumps(results))


if __name__ == "__main__":
    gc.freeze()
    torch.distributed.init_process_group("gloo")
    for kind, precision in itertools.product(("ddp", "fsdp2"), ("fp32", "bf16")):
        run(kind, precision, Path(sys.argv[1]), torch.distributed.get_rank())
    resume(Path(sys.argv[1]), torch.distributed.get_rank())
    torch.distributed.destroy_process_group()
