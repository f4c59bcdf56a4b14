"""Perplexity ranking of many passages: is memory flat, and is nothing scored twice after SIGKILL?

    python benchmarks/diagnose_ranking.py --text FILE… [--passages 50000] [--model lab] [--kills 3]

A child process ranks the text; this one kills it ``--kills`` times at even distances, starts it again, and reads the
child's resident memory all along. Prints the numbers of docs/results/diagnose-ranking.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from holdfast.diagnose.corpus import Passage, read_passages
from holdfast.diagnose.ranking import RECORD, PerplexityScorer, ScoreLog, rank
from holdfast.diagnose.selection import select


def stream(files: list[str], words: int, count: int) -> Iterator[Passage]:
    """The first ``count`` passages of the files together."""
    return islice((p for file in files for p in read_passages(file, passage_words=words)), count)


def child(arguments: argparse.Namespace) -> None:
    """Rank, writing the number of every passage that is scored to ``scored.txt``."""
    import torch

    from holdfast.models import load_model

    torch.set_num_threads(1)
    folder = Path(arguments.folder)
    model, tokenizer = load_model(arguments.model)
    scorer = PerplexityScorer(model, tokenizer, max_tokens=128)
    scored = (folder / "scored.txt").open("a")

    def counted(texts: list[str]) -> list[tuple[float, int]]:
        found = scorer(texts)
        scored.write("".join(f"{Passage(text, '').key}\n" for text in texts))
        scored.flush()
        return found

    log = ScoreLog(folder / "ranking", {"model": arguments.model})
    rank(stream(arguments.text, arguments.words, arguments.passages), counted, log)  # type: ignore[arg-type]


def resident(pid: int) -> float:
    """MB of resident memory that isn't a mapped file."""
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")) / 1024


def watch(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Run, kill, run again; memory by tenth of the corpus, restarts and scored passages."""
    scores = folder / "ranking" / "scores.bin"
    kills = [arguments.passages * (k + 1) // (arguments.kills + 1) for k in range(arguments.kills)]
    memory: dict[int, float] = {}
    saved: list[int] = []
    start = time.time()
    command = [sys.executable, __file__, "--folder", str(folder), "--passages", str(arguments.passages)]
    command += ["--words", str(arguments.words), "--model", arguments.model, "--text", *arguments.text]
    while True:
        process = subprocess.Popen(command)
        while process.poll() is None:
            done = scores.stat().st_size // RECORD.itemsize if scores.exists() else 0
            if done:
                tenth = 10 * done // arguments.passages
                memory[tenth] = max(memory.get(tenth, 0.0), resident(process.pid))
            if kills and done >= kills[0]:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                saved.append(scores.stat().st_size // RECORD.itemsize)
                kills.pop(0)
                break
            time.sleep(0.2)
        else:
            if process.returncode:
                raise SystemExit(f"the ranking failed with {process.returncode}")
            break
    return {"seconds": round(time.time() - start, 1), "memory_mb_by_tenth": memory, "saved_at_kill": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--passages", type=int, default=50_000)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        child(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = watch(arguments, folder)
        log = ScoreLog(folder / "ranking", {"model": arguments.model})
        lines = (folder / "scored.txt").read_text().split()
        records = list(log)
        result |= {
            "passages": len(records),
            "with_tokens": sum(score.tokens > 0 for score in records),
            "tokens": sum(score.tokens for score in records),
            "scored": len(lines),
            "scored_twice": len(lines) - len(set(lines)),
        }
        before = time.time()
        chosen = select(stream(arguments.text, arguments.words, arguments.passages), log, tokens=200_000)
        result |= {
            "select_seconds": round(time.time() - before, 1),
            "restoring": chosen.account["restoring"],
            "probing": chosen.account["probing"],
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
