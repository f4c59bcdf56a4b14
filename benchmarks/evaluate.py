"""PrefixSharingLM against lm-eval's HFLM: speed, peak memory and equality, in one run.

    python benchmarks/evaluate.py --model MODEL --data DATA --out results.json

MODEL is a Hugging Face folder, DATA holds bench/ and text/ files as described in docs/evaluate.md. HFLM runs at its
best of several batch sizes, found on eight items (generation: on all); both engines get the same requests in the same
process. Every task is a sample of items (``--scale`` multiplies the counts).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.evaluate import PrefixSharingLM
from holdfast.evaluate.formats import copa, hellaswag, mmlu, question
from holdfast.evaluate.panel_data import read_rows
from holdfast.evaluate.tasks import Item

Pairs = list[tuple[Any, ...]]


class PeakMemory:
    """Largest growth of resident memory while the block runs, in MiB, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.process, self.stop = psutil.Process(), threading.Event()
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.mib = (self.peak - self.start) / 2**20


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    return list(read_rows(data / name))


def pairs(items: list[Item], prefix: Callable[[int], str] = lambda k: "") -> Pairs:
    return [(prefix(k) + item.prompt, choice) for k, item in enumerate(items) for choice in item.choices]


def worked(item: Item) -> str:
    return item.prompt + item.choices[int(item.answer or 0)] + "\n\n"


def sizes(items: list[Item]) -> list[int]:
    """Choices of each item."""
    return [len(item.choices) for item in items]


def tasks(data: Path, scale: float) -> dict[str, tuple[str, Pairs, list[int]]]:
    """name -> (request type, arguments, requests of each item). Items are drawn with seed 0."""
    draw = random.Random(0)

    def sample(found: list[Any], count: int) -> list[Any]:
        return draw.sample(found, min(len(found), max(1, round(count * scale))))

    def some(name: str, fmt: Callable[[str, Any], Item], count: int) -> list[Item]:
        return [fmt(str(k), row) for k, row in enumerate(sample(rows(data, name), count))]

    swag = [hellaswag(str(k), row) for k, row in enumerate(rows(data, "bench/hellaswag_validation.jsonl.gz"))]
    few = sample(swag, 12)
    shots = ["".join(worked(item) for item in draw.sample(swag, 5)) for _ in few]  # lm-eval draws anew for each item
    dev: dict[str, list[Item]] = {}
    for k, row in enumerate(rows(data, "bench/mmlu_dev.jsonl.gz")):
        dev.setdefault(row["subject"], []).append(mmlu(str(k), row))
    subjects = draw.sample(sorted(dev), 1)  # a subject has 246 items on average: the examples are shared by many
    lettered = []
    for subject in subjects:
        found = [row for row in rows(data, "bench/mmlu_test.jsonl.gz") if row["subject"] == subject]
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        head += "".join(worked(item) for item in dev[subject])
        lettered += [
            Item(f"{subject}-{k}", head + item.prompt, item.choices, item.answer)
            for k, row in enumerate(sample(found, 60))
            if (item := mmlu(str(k), row))
        ]
    documents = sample(rows(data, "text/c4_sample.jsonl.gz"), 6)
    prompts = some("bench/arc_easy_test.jsonl.gz", question, 16)
    found = {
        "hellaswag 0-shot": some("bench/hellaswag_validation.jsonl.gz", hellaswag, 64),
        "arc_easy 0-shot": some("bench/arc_easy_test.jsonl.gz", question, 48),
        "copa 0-shot": some("bench/copa_dev.jsonl.gz", copa, 64),
    }
    return {
        "hellaswag 5-shot": ("loglikelihood", pairs(few, lambda k: shots[k]), sizes(few)),
        "mmlu 5-shot": ("loglikelihood", pairs(lettered), sizes(lettered)),
        **{name: ("loglikelihood", pairs(items), sizes(items)) for name, items in found.items()},
        "c4 perplexity": (
            "loglikelihood_rolling",
            [(row["text"][:2000],) for row in documents],
            [1] * len(documents),
        ),
        **{
            name: (
                "generate_until",
                [(item.prompt, {"until": [stop], "max_gen_toks": most, "do_sample": False}) for item in prompts],
                [1] * len(prompts),
            )
            for name, stop, most in (("generation, a line", "\n", 32), ("generation, long", "\n\n\n\n", 96))
        },
    }


def run(lm: Any, kind: str, arguments: Pairs) -> tuple[list[Any], float, float, float]:
    requests = [Instance(kind, {}, pair, k) for k, pair in enumerate(arguments)]
    with PeakMemory() as memory:
        start, start_cpu = time.perf_counter(), time.process_time()
        answers = getattr(lm, kind)(requests, disable_tqdm=True)
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return answers, seconds, cpu, memory.mib


def agreement(kind: str, ours: list[Any], theirs: list[Any], choices: list[int]) -> dict[str, Any]:
    if kind == "generate_until":
        return {"equal": sum(a == b for a, b in zip(ours, theirs, strict=True)), "of": len(ours)}
    if kind == "loglikelihood_rolling":
        return {"largest difference per document": max(abs(a - b) for a, b in zip(ours, theirs, strict=True))}
    starts = [sum(choices[:k]) for k in range(len(choices))]
    best = [
        [max(range(start, start + n), key=lambda i: answers[i][0]) for start, n in zip(starts, choices, strict=True)]
        for answers in (ours, theirs)
    ]
    return {
        "same choice": sum(a == b for a, b in zip(*best, strict=True)),
        "of": len(best[0]),
        "largest difference": max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)),
        "same greedy flags": all(a[1] == b[1] for a, b in zip(ours, theirs, strict=True)),
    }


def best_batch(
    model: Any, tokenizer: Any, kind: str, arguments: Pairs, candidates: list[int], choices: list[int]
) -> int:
    """HFLM's fastest batch size on the first eight items; on all where texts are generated, as eight fill no batch."""
    part = arguments if kind == "generate_until" else arguments[: sum(choices[:8])]
    times = {}
    for size in candidates:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        times[size] = run(lm, kind, part)[2]
    return min(times, key=lambda size: times[size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    results = {}
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}", flush=True)
    for name, (kind, arguments, choices) in tasks(options.data, options.scale).items():
        if options.only and not any(part in name for part in options.only):
            continue
        size = best_batch(model, tokenizer, kind, arguments, options.batch_sizes, choices)
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        ours = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_tokens=options.batch_tokens)
        ours.loglikelihood([Instance("loglikelihood", {}, ("a b c", " d"), 0)])  # its one-time self-check
        times: dict[str, list[float]] = {"ours": [], "hflm": []}
        cpu: dict[str, list[float]] = {"ours": [], "hflm": []}  # what other programs on the machine disturb less
        memory: dict[str, float] = {"ours": 0.0, "hflm": 0.0}
        for _ in range(options.repeats):
            answers = {}
            for label, lm in (("hflm", theirs), ("ours", ours)):
                answers[label], seconds, busy, mib = run(lm, kind, arguments)
                times[label].append(round(seconds, 2))
                cpu[label].append(round(busy, 2))
                memory[label] = max(memory[label], mib)
        ratios = [b / a for a, b in zip(times["ours"], times["hflm"], strict=True)]
        results[name] = {
            "requests": len(arguments),
            "hflm batch size": size,
            "seconds": times,
            "cpu seconds": cpu,
            "speedup": [round(ratio, 2) for ratio in ratios],
            "speedup in cpu time": [round(b / a, 2) for a, b in zip(cpu["ours"], cpu["hflm"], strict=True)],
            "peak MiB over the model": {label: round(value) for label, value in memory.items()},
            **agreement(kind, answers["ours"], answers["hflm"], choices),
        }
        print(name, json.dumps(results[name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
