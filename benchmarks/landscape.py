"""Cost of an 11 x 11 loss surface against its forwards alone, and against loss-landscapes 3.0.

    python benchmarks/landscape.py --peer-python /path/to/venv/bin/python --out landscape.json

A random Llama of about 100M parameters (what the weights are does not change the cost) and a fixed subset of
``--rows`` x ``--width`` tokens. One forward over the subset is timed before and after every scan; a scan's figure is
its whole wall-clock time, directions, norms and restoring included, over points x that forward. The subset is smaller
than the library's default (64 rows of up to 512 tokens), which makes the figure worse: moving the weights costs the
same, the forward less. Memory is the peak of the process's resident memory over that of the forwards alone, in
copies of the weights. ``--peer-python`` is the interpreter of an environment with loss-landscapes, torch and
transformers; the peer runs its default, filter-normalised random plane, on the same model, subset and loss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def build(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=7,
                         num_attention_heads=12, num_key_value_heads=12)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def subset(rows: int, width: int) -> Tensor:
    return torch.randint(0, 32000, (rows, width), generator=torch.Generator().manual_seed(1))


def seconds_of(function: Callable[[], Any], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found


def resident() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@contextmanager
def peak() -> Iterator[list[int]]:
    """The highest resident memory while the block runs, sampled every 20 ms."""
    found, stop = [resident()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            found[0] = max(found[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from holdfast.landscape import TokenLoss, surface
    from holdfast.landscape.objective import mean_loss

    model, ids = build(), subset(arguments.rows, arguments.width)
    objective = TokenLoss(({"input_ids": ids, "labels": ids},))
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def forward() -> None:
        mean_loss(objective, model)

    def plain() -> None:
        with torch.no_grad():
            model(input_ids=ids, labels=ids, use_cache=False)

    forward()
    with peak() as before:
        forwards = seconds_of(forward, 3)
    result: dict[str, Any] = {
        "parameters": size // 4, "tokens": objective.tokens, "threads": torch.get_num_threads(),
        "transformers forward s": min(seconds_of(plain, 3)), "points": arguments.grid**2,
    }  # fmt: skip
    for memory in ("stored", "regenerated"):
        with peak() as during:
            start = time.perf_counter()
            found = surface(model, objective, grid=arguments.grid, range=1.0, directions=arguments.directions,
                            memory=memory, seed=0)  # type: ignore[arg-type]  # fmt: skip
            total = time.perf_counter() - start
        after = seconds_of(forward, 3)
        one = sorted([*forwards, *after])[3]
        forwards = after
        result[memory] = {
            "total s": total, "forward s": one, "forwards seen s": [min(after), max(after)],
            "ratio": total / (arguments.grid**2 * one),
            "ratio to its own forwards": total / found.meta["seconds"]["loss"],
            "moving s per point": found.meta["seconds"]["moving"] / arguments.grid**2,
            "extra copies": (during[0] - before[0]) / size,
            "centre": found.centre, "corner": float(found.grid[0, 0]),
        }  # fmt: skip
        print(f"{memory}: {result[memory]}", flush=True)
    return result


def peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the other package does; runs in its own environment."""
    import loss_landscapes
    from loss_landscapes.metrics import Metric

    model, ids = build(), subset(arguments.rows, arguments.width)
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    class Loss(Metric):
        def __call__(self, wrapper: Any) -> float:
            with torch.no_grad():
                return float(wrapper.modules[0](input_ids=ids, labels=ids, use_cache=False).loss)

    wrapped = type("Wrapped", (), {"modules": [model]})()
    Loss()(wrapped)
    with peak() as before:
        forwards = seconds_of(lambda: Loss()(wrapped), 3)
    with peak() as during:
        start = time.perf_counter()
        loss_landscapes.random_plane(model, Loss(), distance=1, steps=arguments.peer_grid, normalization="filter",
                                     deepcopy_model=True)  # fmt: skip
        total = time.perf_counter() - start
    forwards += seconds_of(lambda: Loss()(wrapped), 3)
    one = sorted(forwards)[3]
    points = arguments.peer_grid**2
    return {
        "points": points, "total s": total, "forward s": one, "ratio": total / (points * one),
        "extra copies": (during[0] - before[0]) / size,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=11)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--directions", default="filter")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-grid", type=int, default=11)
    parser.add_argument("--peer-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.peer_only:
        print(json.dumps(peer(arguments)))
        return
    result = ours(arguments)
    if arguments.peer_python:
        command = [arguments.peer_python, __file__, "--peer-only"]
        for name in ("rows", "width", "peer_grid"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the peer failed:\n{done.stderr[-2000:]}")
        result["loss-landscapes"] = json.loads(done.stdout.splitlines()[-1])
        print(f"loss-landscapes: {result['loss-landscapes']}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
