"""Cost of an 11 x 11 loss surface against its forwards alone, and against loss-landscapes 3.0.

    python benchmarks/landscape.py --peer-python /path/to/venv/bin/python --out landscape.json

A random Llama of about 100M parameters (what the weights are does not change the cost) and a fixed subset of
``--rows`` x ``--width`` tokens. One forward over the subset is timed before and after every scan; a scan's figure is
its whole time, directions, norms and restoring included, over points x that forward. The subset is smaller
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


def now() -> tuple[float, float]:
    """Wall-clock and processor seconds; the second is the one to read on a machine that others use too."""
    return time.perf_counter(), time.process_time()


def seconds_of(function: Callable[[], Any], times: int) -> list[tuple[float, float]]:
    """Wall-clock and processor seconds of each call."""
    found = []
    for _ in range(times):
        start = now()
        function()
        end = now()
        found.append((end[0] - start[0], end[1] - start[1]))
    return found


def median(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    wall, processor = (sorted(pair[i] for pair in pairs)[len(pairs) // 2] for i in (0, 1))
    return wall, processor


def figures(
    total: tuple[float, float], one: tuple[float, float], points: int, rest: tuple[float, float], project: int
) -> dict[str, Any]:
    """A scan's time over its points' forwards, by both clocks; ``rest`` is what a scan costs besides its points.

    With ``project`` the points that weren't scanned are added at the mean cost of those that were.
    """
    if project > points:
        wall, processor = (r + (t - r) * project / points for t, r in zip(total, rest, strict=True))
        total, points = (wall, processor), project
    return {
        "points counted": points,
        "total s": total[0], "forward s": one[0], "ratio": total[0] / (points * one[0]),
        "total processor s": total[1], "forward processor s": one[1], "processor ratio": total[1] / (points * one[1]),
    }  # fmt: skip


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
        "transformers forward s": median(seconds_of(plain, 3)), "points": arguments.grid**2,
    }  # fmt: skip
    for memory in arguments.memory:
        marks: list[tuple[float, float]] = []
        with peak() as during:
            start = now()
            found = surface(model, objective, grid=arguments.grid, range=1.0, directions=arguments.directions,
                            memory=memory, seed=0, on_point=lambda done, of, at=marks: at.append(now()))  # type: ignore[arg-type]  # fmt: skip
            end = now()
        # between the first and the last point nothing but points happens
        points = arguments.grid**2
        rest = tuple((e - s) - (b - a) * points / (points - 1) for s, a, b, e in zip(start, marks[0], marks[-1], end))
        after = seconds_of(forward, 3)
        one = median([*forwards, *after])
        forwards = after
        result[memory] = {
            **figures((end[0] - start[0], end[1] - start[1]), one, arguments.grid**2, rest, arguments.project**2),
            "forwards seen s": [min(after), max(after)],
            "ratio to its own forwards": (end[0] - start[0]) / found.meta["seconds"]["loss"],
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
        start = now()
        loss_landscapes.random_plane(model, Loss(), distance=1, steps=arguments.peer_grid, normalization="filter",
                                     deepcopy_model=True)  # fmt: skip
        end = now()
    forwards += seconds_of(lambda: Loss()(wrapped), 3)
    points = arguments.peer_grid**2
    numbers = figures((end[0] - start[0], end[1] - start[1]), median(forwards), points, (0.0, 0.0), 0)
    return {"points": points, **numbers, "extra copies": (during[0] - before[0]) / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=11)
    parser.add_argument("--project", type=int, default=0, help="count a grid of this side, from the points scanned")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--directions", default="filter")
    parser.add_argument("--memory", nargs="+", default=["stored", "regenerated"])
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
