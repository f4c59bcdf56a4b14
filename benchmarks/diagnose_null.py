"""How often does the diagnosis see forgetting where there is none, and how often does it find what is there?

    python benchmarks/diagnose_null.py [--simulations 200] [--seed 0]

Each simulation draws a probability of a right answer per item (Beta(2, 1), mean 2/3). Null: base, tuned, restored and
control are all drawn from it. Shift: the tuned model loses ``drop`` points, the restored has them back. Loss: tuned and
restored lose them.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from holdfast.diagnose import decompose


def verdicts(kind: str, items: int, drop: float, simulations: int, seed: int) -> Counter[str]:
    """The verdicts of so many simulated panels."""
    rng = np.random.default_rng([seed, items, int(1000 * drop)])
    found: Counter[str] = Counter()
    for simulation in range(simulations):
        probability = rng.beta(2, 1, size=items)
        lower = probability * (1 - drop / probability.mean())
        low = {"null": (0, 0), "shift": (1, 0), "loss": (1, 1)}[kind]
        means = (probability, *((lower if flag else probability) for flag in low), probability)
        models = [(rng.random(items) < mean).astype(float) for mean in means]
        found[decompose(*models, resamples=2000, seed=simulation).verdict] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = ("none", "undecided", "pseudo", "actual")
    print("| truth | drop, points | items | " + " | ".join(names) + " |\n|---|---|---|" + "---|" * len(names))
    for kind, drop in (("null", 0.0), ("shift", 0.05), ("shift", 0.15), ("loss", 0.05), ("loss", 0.15)):
        for items in (100, 500, 2000, 10_000):
            found = verdicts(kind, items, drop, arguments.simulations, arguments.seed)
            cells = (f"{100 * found[name] / arguments.simulations:.1f} %" for name in names)
            print(f"| {kind} | {100 * drop:g} | {items:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
