"""The diagnosis on a real model: SmolLM2-135M tuned on Alpaca, WikiText to restore with, ARC-easy and MMLU to ask.

    python benchmarks/diagnose_smollm2.py --model smollm2-135m --data DATA --out DIR
    python benchmarks/diagnose_smollm2.py --model smollm2-135m --data DATA --out DIR --tuned FOLDER --tokens 14000

The second form tunes nothing: it diagnoses a checkpoint that is there, restored with so many tokens.

DATA holds instruct/alpaca_5k.jsonl.gz, text/wikitext2_train_part.txt.gz, bench/arc_easy_test.jsonl.gz and
bench/mmlu_test.jsonl.gz. ARC-easy is scored by the answers' text, MMLU by the letters A to D without examples, so that
label mass is that of paper 2. Sizes are small enough for a few CPU minutes a checkpoint; they are options.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from diagnose_lab import print_chain
from diagnose_tune import tune

from holdfast.data import raw_rows, read_examples
from holdfast.diagnose.diagnosis import diagnose
from holdfast.diagnose.page import write_page
from holdfast.diagnose.request import Request
from holdfast.diagnose.restoring import RestoreSettings
from holdfast.evaluate.tasks import EvalTask, Item

LETTERS = "ABCD"


def arc(rows: list[dict[str, Any]]) -> EvalTask:
    items = [
        Item(f"arc/{n}", f"Question: {row['question']}\nAnswer:", tuple(f" {c}" for c in row["choices"]), row["answer"])
        for n, row in enumerate(rows)
    ]
    return EvalTask("arc_easy", "choice", tuple(items), chance=25.0)


def mmlu(rows: list[dict[str, Any]]) -> EvalTask:
    items = []
    for n, row in enumerate(rows):
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"]))
        prompt = f"Question: {row['question']}\n{options}\nAnswer:"
        items.append(Item(f"mmlu/{n}", prompt, tuple(f" {x}" for x in LETTERS), row["answer"], group=row["subject"]))
    return EvalTask("mmlu", "choice", tuple(items), chance=25.0)


def sample(file: Path, count: int, seed: int, longest: int = 600) -> list[dict[str, Any]]:
    """Random rows with short questions: long passages cost most of the time and add nothing here."""
    rows = [row for row in raw_rows(file) if len(row["question"]) <= longest]
    return random.Random(seed).sample(rows, count)


def tune_on_alpaca(options: argparse.Namespace, precision: dict[str, bool]) -> tuple[Any, list[Path]]:
    """The tuning data and the checkpoints that are kept."""
    data = read_examples(options.data / "instruct/alpaca_5k.jsonl.gz").shuffle(seed=options.seed)
    data = data.filter(lambda row: len(row["prompt"]) + len(row["completion"]) < 700).select(range(options.rows))
    folders = tune(
        options.model,
        data,
        options.out / "run",
        epochs=options.epochs,
        learning_rate=options.lr,
        batch_size=8,
        seed=options.seed,
        keep=options.keep,
        settings=precision,
    )
    return data, folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 3, 6, 10])
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--restore-lr", type=float, default=3e-5)
    parser.add_argument("--arc", type=int, default=250)
    parser.add_argument("--mmlu", type=int, default=150)
    parser.add_argument("--passages", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", type=Path, nargs="+", help="checkpoints to diagnose instead of tuning")
    parser.add_argument("--tokens", type=int, help="tokens to restore with; needed with --tuned")
    options = parser.parse_args()
    start = time.time()
    cuda = torch.cuda.is_available()
    precision = {"bf16": cuda, "use_cpu": not cuda}  # bf16 autocast is many times slower on processors without bf16
    data, folders = None, options.tuned
    if not folders:
        data, folders = tune_on_alpaca(options, precision)
        print(f"tuned: {time.time() - start:.0f} s", flush=True)
    tasks = [arc(sample(options.data / "bench/arc_easy_test.jsonl.gz", options.arc, options.seed))]
    if options.mmlu:
        tasks.append(mmlu(sample(options.data / "bench/mmlu_test.jsonl.gz", options.mmlu, options.seed, longest=250)))
    request = Request(
        base=options.model,
        checkpoints=tuple(str(folder) for folder in folders),
        corpus=str(options.data / "text/wikitext2_train_part.txt.gz"),
        tasks=tuple(tasks),
        tuning=data,
        tokens=options.tokens,
        passages=options.passages,
        passage_words=100,
        max_tokens=256,
        restoring=RestoreSettings(
            learning_rate=options.restore_lr, batch_size=4, max_length=256, probes=3, training=precision
        ),
        keep_restored=False,
    )

    def say(message: str) -> None:
        print(f"{time.time() - start:.0f} s: {message}", flush=True)

    result = diagnose(request, options.out / "diagnosis", say=say)
    write_page(result, options.out / "diagnosis" / "diagnosis.html")
    print(result["text"])
    print_chain(result)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
