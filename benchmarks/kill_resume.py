"""Kill a study at random moments, resume it, and compare every number with an uninterrupted run.

    python benchmarks/kill_resume.py quickstart --kills 10 --out /tmp/kills

Runs the recipe once to its end, then again in another directory, where the process gets SIGKILL after a random time,
``--kills`` times, before it may finish. Prints each kill and, at the end, whether study.json and items.parquet are
equal in everything but clocks.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

CLOCKS = ("seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "holdfast",
        "run",
        arguments.recipe,
        *arguments.overrides,
        "--out",
        str(out),
        "--quiet",
    ]


def without_clocks(value: Any) -> Any:
    """study.json without durations."""
    if isinstance(value, dict):
        return {key: without_clocks(inner) for key, inner in value.items() if key not in CLOCKS}
    if isinstance(value, list):
        return [without_clocks(inner) for inner in value]
    return value


def kill_often(arguments: argparse.Namespace, out: Path) -> int:
    """Kill a running study after random times until ``kills`` kills have hit; returns how many finished early."""
    rng = random.Random(arguments.seed)
    kills = early = 0
    while kills < arguments.kills:
        wait = rng.uniform(*arguments.between)
        process = subprocess.Popen(command(arguments, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            steps = len(list((out / "steps").glob("[!.]*"))) if (out / "steps").exists() else 0
            measures = len(list((out / "measures").glob("*.parquet"))) if (out / "measures").exists() else 0
            print(f"kill {kills} after {wait:.1f} s: {steps} steps and {measures} measurements are done", flush=True)
            continue
        if process.returncode != 0:
            sys.exit(f"the study failed: {process.stderr.read().decode() if process.stderr else ''}")
        early += 1
        print(f"finished before the kill ({wait:.1f} s); its results are removed and it starts again", flush=True)
        shutil.rmtree(out)
    return early


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--between", type=float, nargs=2, default=(8.0, 30.0), help="seconds from start to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    began = time.perf_counter()
    subprocess.run(command(arguments, whole), check=True)
    whole_s = time.perf_counter() - began
    print(f"uninterrupted: {whole_s:.0f} s", flush=True)
    kill_often(arguments, killed)
    subprocess.run(command(arguments, killed), check=True)
    left, right = (without_clocks(json.loads((run / "study.json").read_text())) for run in (whole, killed))
    same = left == right
    items = [pd.read_parquet(run / "items.parquet") for run in (whole, killed)]
    print(f"study.json equal but for clocks: {same}; items.parquet equal: {items[0].equals(items[1])}")
    sys.exit(0 if same and items[0].equals(items[1]) else 1)


if __name__ == "__main__":
    main()
