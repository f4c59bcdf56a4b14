"""What each method costs: step time and peak memory as a ratio to plain AdamW, measured side by side in one run.

    python benchmarks/cost.py --model lab                         # the embedded model, every method
    python benchmarks/cost.py --model 100m --clock cpu --warm 1 --only sam sam-10 l2 sfa
    python benchmarks/cost.py --model lab --peer-python PEER/bin/python    # also pytorch_optimizer's SAM, if it has it

Each method has a process of its own, so that peak memory is its own. In it two trainings share one model and AdamW's
moments and take turns step by step: transformers' plain Trainer, and the same with the method. Both work on the same
memory at nearly the same time, so that what differs between two processes, or changes with time, cancels. The order in
a pair of steps alternates. A ratio is the method's time over the plain Trainer's in the same process, the table's the
median over rounds. The row ``plain`` is the control: the plain Trainer, and the same with an empty list of methods; how
far it is from 1 is how little the others are to be trusted. ``--clock cpu`` counts processor time instead of wall time.
The first steps are not counted. Prints a Markdown table.

Work that is done once a window (L2's term, an average) weighs the less, the more tokens a window has. Unless told
otherwise, the lab model gets the window of the lab study (recipes/lab-methods.yaml), 32 rows of 64 tokens, and the
others 4,096 tokens in four micro-batches of 4 rows of 256.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# One heap for the threads of a process, and memory once taken is kept: fresh pages cost up to half a second a step,
# in some steps and not in others (for glibc; elsewhere without effect).
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
SIZES: dict[str, dict[str, int]] = {
    "100m": {"vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11},
    "tiny": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
}
LAB_WINDOW = {"batch": 32, "length": 64, "accumulation": 1}
WINDOW = {"batch": 4, "length": 256, "accumulation": 4}


def methods() -> dict[str, Callable[[], list[Any]]]:
    from holdfast import EMA, EWC, L2, SAM, SFA, Distill, FisherMerge, Freeze, Rehearsal, WiSEFT
    from holdfast.methods import L1, MomentumSAM

    return {
        "plain": list,
        "sam": lambda: [SAM(rho=0.05)],
        "sam-asam": lambda: [SAM(rho=0.5, adaptive="asam")],
        "sam-norm": lambda: [SAM(rho=0.05, scope="norm")],
        "sam-mask": lambda: [SAM(rho=0.05, mask=0.5)],
        "sam-micro": lambda: [SAM(rho=0.05, group="micro")],
        "sam-10": lambda: [SAM(rho=0.05, every=10)],
        "looksam-10": lambda: [SAM(rho=0.05, every=10, reuse=0.7)],
        "msam": lambda: [MomentumSAM(rho=0.5)],
        "l2": lambda: [L2(weight=0.1)],
        "l1": lambda: [L1()],
        "ewc": lambda: [EWC(samples=4)],
        "freeze": lambda: [Freeze(layers=1)],
        "distill": lambda: [Distill()],
        "sfa": lambda: [SFA(p=0.25)],
        "ema": lambda: [EMA()],
        "wiseft": lambda: [WiSEFT()],
        "fisher_merge": lambda: [FisherMerge(samples=4)],
        "rehearsal": lambda: [Rehearsal(share=0.1)],
    }


def clock_of(given: argparse.Namespace) -> Callable[[], float]:
    """Seconds until now, what the GPU has been given included."""
    clock = CLOCKS[given.clock]

    def after_gpu() -> float:
        torch.cuda.synchronize()
        return clock()

    return clock if given.cpu else after_gpu


def make_model(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    if name == "lab":
        from transformers import AutoModelForCausalLM

        from holdfast.lab import model_dir

        return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    heads = {"num_attention_heads": 12 if name == "100m" else 2, "max_position_embeddings": 1024}
    return LlamaForCausalLM(LlamaConfig(**SIZES[name], **heads)).float()


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Turns(TrainerCallback):
    """Stops a training before each step until it is told to go on; times each step from its begin to the next one's.

    So everything a step costs is in it, edits of weights included, and waiting is not.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._go, self._stopped = clock, threading.Semaphore(0), threading.Semaphore(0)
        self._started: float | None = None
        self.seconds: list[float] = []

    def start(self, trainer: Trainer, pool: ThreadPoolExecutor) -> Future[Any]:
        """Let it set up; returns when it waits before its first step."""
        training = pool.submit(self._train, trainer)
        self._stopped.acquire()
        return training

    def step(self) -> None:
        """Let it compute one step; returns when it waits before the next or has ended."""
        self._go.release()
        self._stopped.acquire()

    def _train(self, trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the other training waits for a turn that would never come
        self._stopped.release()

    def _stop(self) -> None:
        if self._started is not None:
            self.seconds.append(self._clock() - self._started)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._stop()
        self._stopped.release()
        self._go.acquire()
        self._started = self._clock()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop()


def measure(label: str, given: argparse.Namespace, anchor: str, answer: Any) -> None:
    """A method and the plain Trainer on the same weights, in turns; sends seconds a step of both and peak memory."""
    from holdfast import with_methods

    torch.set_num_threads(given.threads)
    model = make_model(given.model)
    vocabulary = model.config.vocab_size
    count = given.steps + given.warm
    train_dataset = Rows(count * given.batch * given.accumulation, given.length, vocabulary)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=count,
            per_device_train_batch_size=given.batch,
            gradient_accumulation_steps=given.accumulation,
            learning_rate=1e-5,
            logging_steps=given.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=given.cpu,
        )
        turns = [Turns(clock_of(given)), Turns(clock_of(given))]
        trainers = [
            Trainer(model=model, args=args, train_dataset=train_dataset, callbacks=turns[:1]),
            with_methods(Trainer)(
                model=model,
                args=args,
                train_dataset=train_dataset,
                methods=methods()[label](),
                memory={"past": Rows(64, given.length, vocabulary)},
                anchor=anchor,
                callbacks=turns[1:],
            ),
        ]
        trainings = [turn.start(trainer, pool) for turn, trainer in zip(turns, trainers, strict=True)]
        share_moments(*trainers)
        for number in range(count):
            for turn in turns if number % 2 == 0 else turns[::-1]:
                turn.step()
        for training in trainings:
            training.result()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available() and not given.cpu:
        peak = torch.cuda.max_memory_allocated()
    plain, own = (statistics.fmean(turn.seconds[given.warm :]) for turn in turns)
    answer.send({"seconds": own, "plain_seconds": plain, "peak": peak})


def share_moments(plain: Trainer, other: Trainer) -> None:
    """Both optimizers, which have not stepped yet, keep one state: the moments of the weights that both train."""
    optimizers: list[Any] = [plain.optimizer, other.optimizer]
    of_plain, of_other = (getattr(each, "optimizer", each) for each in optimizers)
    assert not of_plain.state and not of_other.state
    of_plain.state = of_other.state


def peer_sam(given: argparse.Namespace) -> None:
    """AdamW and pytorch_optimizer's SAM around AdamW on the same model, a step each; run by the peer's Python."""
    from pytorch_optimizer import SAM

    clock, ratios = clock_of(given), []
    for _ in range(given.rounds):
        models = {kind: make_model(given.model) for kind in ("adamw", "sam")}
        optimizers: dict[str, Any] = {
            "adamw": torch.optim.AdamW(models["adamw"].parameters(), lr=1e-5),
            "sam": SAM(models["sam"].parameters(), torch.optim.AdamW, rho=0.05, lr=1e-5),
        }
        seconds = dict.fromkeys(models, 0.0)
        rows = Rows(given.batch, given.length, models["sam"].config.vocab_size).ids
        for step, kind in itertools.product(range(given.steps + given.warm), models):

            def closure(model: Any = models[kind], rows: Any = rows) -> Any:
                loss = model(input_ids=rows, labels=rows).loss
                loss.backward()
                return loss

            start = clock()
            loss = closure()
            optimizers[kind].step(closure) if kind == "sam" else optimizers[kind].step()
            optimizers[kind].zero_grad()
            float(loss)
            if step >= given.warm:
                seconds[kind] += clock() - start
        ratios.append(seconds["sam"] / seconds["adamw"])
    print(json.dumps({"ratios": ratios}))


def run(label: str, given: argparse.Namespace, anchor: str) -> dict[str, float]:
    """One round of one method, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=measure, args=(label, given, anchor, other), daemon=True)
    process.start()
    other.close()
    try:
        return mine.recv()
    except EOFError:
        sys.exit(f"{label}: the training failed")
    finally:
        process.join()


def table(results: dict[str, list[dict[str, float]]], weight_bytes: float) -> str:
    lines = [
        "| method | step time (ratio, range) | peak memory (ratio) | extra copies of the weights | seconds a step |",
        "|---|---|---|---|---|",
    ]
    for label, rounds in results.items():
        ratios = [each["seconds"] / each["plain_seconds"] for each in rounds]
        memory = statistics.median(each["peak"] / each["plain_peak"] for each in rounds)
        more = statistics.median(each["peak"] - each["plain_peak"] for each in rounds) / weight_bytes
        lines.append(
            f"| {label} | {spread(ratios)} | {memory:.2f} | {more:+.2f} "
            f"| {statistics.median(each['seconds'] for each in rounds):.3f} |"
        )
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab", choices=["lab", *SIZES])
    parser.add_argument("--only", nargs="+", help="labels of the table; plain is always run")
    parser.add_argument(
        "--steps", type=int, default=20, help="counted steps; a multiple of 10 counts cheap forms right"
    )
    parser.add_argument("--warm", type=int, default=3, help="first steps, not counted")
    parser.add_argument("--rounds", type=int, default=3)
    for part in WINDOW:
        parser.add_argument(f"--{part}", type=int, help=f"default: {LAB_WINDOW[part]} (lab), {WINDOW[part]} (others)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available())
    parser.add_argument("--peer-python", help="a Python with torch, transformers and pytorch_optimizer")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for part, size in (LAB_WINDOW if given.model == "lab" else WINDOW).items():
        if getattr(given, part) is None:
            setattr(given, part, size)
    return given


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    if given.as_peer:
        peer_sam(given)
        return
    os.environ |= MALLOC | {"OMP_NUM_THREADS": str(given.threads)}
    if unknown := set(given.only or ()) - set(methods()):
        sys.exit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(methods())}")
    labels = ["plain", *(label for label in methods() if label != "plain" and (not given.only or label in given.only))]
    results: dict[str, list[dict[str, float]]] = {label: [] for label in labels}
    with tempfile.TemporaryDirectory() as anchor:
        model = make_model(given.model)
        weight_bytes = sum(param.numel() * param.element_size() for param in model.parameters())
        model.save_pretrained(anchor)
        del model
        for number, label in itertools.product(range(given.rounds), labels):
            found = run(label, given, anchor)
            control = found if label == "plain" else results["plain"][-1]
            results[label].append(found | {"plain_peak": control["peak"]})
            seconds = f"{label} {found['seconds']:.3f} s, plain {found['plain_seconds']:.3f} s"
            print(f"round {number + 1}: {seconds}", file=sys.stderr)
    print(f"model {given.model}: {weight_bytes / 4e6:.1f} M parameters, fp32, ", end="")
    print(f"{given.accumulation} x {given.batch} x {given.length} tokens a step")
    print(f"{given.rounds} rounds of {given.steps} steps, {given.clock} clock, {given.threads} thread(s), ", end="")
    print(f"torch {torch.__version__}, {platform.machine()}\n\n{table(results, weight_bytes)}")
    if given.peer_python:
        names = ("model", "steps", "warm", "rounds", "batch", "length", "threads", "clock")
        passed = [part for name in names for part in (f"--{name}", getattr(given, name))]
        command = [given.peer_python, Path(__file__).resolve(), "--as-peer", *passed]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        window = f"{given.batch} x {given.length} tokens"
        print(f"\npytorch_optimizer SAM / AdamW (bare loops, {window}): {spread(found['ratios'])}")


if __name__ == "__main__":
    main()
