"""Error rates of the regression gate by simulation: false alarms of eight benchmarks, power by panel size.

    python benchmarks/gate.py [--seed 0]

Prints the tables of docs/gate.md.
"""

from __future__ import annotations

import argparse

from holdfast.evaluate.gate import simulate

SIZES = (100, 200, 300, 500, 817, 1172, 1838, 2376)
DISCORDANCE = (0.02, 0.05, 0.10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed

    def percent(sizes: tuple[int, ...], drop: float, psi: float, budget: float, runs: int) -> float:
        return 100 * simulate(sizes, [drop] * len(sizes), psi, max_drop=budget, runs=runs, seed=seed)

    for budget, drop in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.01)):
        rates = ", ".join(f"{percent(SIZES, drop, psi, budget, 20_000):.2f}" for psi in DISCORDANCE)
        print(f"eight benchmarks, budget {budget:g}, true drop {100 * drop:g} points: {rates} %", flush=True)
    for budget in (0.0, 1.0):
        for n in (250, 500, 1000, 2000, 5000, 10_000):
            cells = (
                ", ".join(f"{percent((n,), drop, psi, budget, 4000):.0f}" for drop in (0.01, 0.03, 0.05))
                for psi in DISCORDANCE
            )
            print(f"| {budget:g} | {n:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
