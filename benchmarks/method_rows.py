"""Write the measured rows of docs/methods/ from a finished run of the recipe `lab-methods`.

    holdfast run lab-methods --out RUN
    python benchmarks/method_rows.py RUN/study.json            # fills the pages, prints the whole table

A page gets the arms that use its method, merge or (peft.md) tuner, below plain sequential tuning: mean over seeds and,
in brackets, the range.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from holdfast.merge.families import resolve
from holdfast.results import Results

PAGES = Path(__file__).parents[1] / "docs" / "methods"
PLAIN = ("sequential", "joint")


def cell(runs: pd.DataFrame, column: str, digits: int = 1) -> str:
    values = runs[column]
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def rows(results: Results) -> dict[str, str]:
    """One Markdown row per arm."""
    runs, found = results.runs(), {}
    for arm in results.arms:
        mine = runs.loc[arm]
        cells = [cell(mine, column) for column in ("math end", "law end", "facts after")]
        found[arm] = f"| {arm} | " + " | ".join([*cells, cell(mine, "text after", 2)]) + " |"
    return found


def table(results: Results, chosen: list[str]) -> str:
    base, every = results.base(), rows(results)
    head = ["math after law, %", "law, %", f"facts, % ({base['facts']:.1f} before)"]
    head.append(f"perplexity of text ({base['text']:.2f} before)")
    lines = [f"| arm | {' | '.join(head)} |", "|---" * 5 + "|", *(every[arm] for arm in chosen)]
    return "\n".join(lines)


def used(arm: dict[str, Any]) -> list[str]:
    """What an arm shows: its methods, its merge (Fisher merging is on the page of the method) and PEFT's tuners."""
    names = [next(iter(method)) for method in arm.get("methods") or []]
    if arm.get("merge"):
        merge, _ = resolve(arm["merge"]["method"], {})
        names.append("fisher_merge" if merge == "fisher" else merge)
    return [*names, "peft"] if arm.get("peft") else names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    options = parser.parse_args()
    data = json.loads(options.study.read_text())
    results = Results(data)
    plain = [arm for arm in PLAIN if arm in results.arms]
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        match = re.search(r"<!-- lab-row: (\w+) -->\n.*?<!-- /lab-row -->", text, re.DOTALL)
        if match is None:
            continue
        arms = [arm for arm in results.arms if match[1] in used(data["arms"][arm])]
        if not arms:
            print(f"{page.name}: no arm uses {match[1]}")
            continue
        seeds = f"seeds {', '.join(map(str, results.seeds))}; mean (range); taught, math scored {{taught}} %."
        taught = cell(results.runs().loc["sequential"], "math taught")
        note = f"Recipe `lab-methods`, math → law, {seeds.format(taught=taught)}"
        filled = f"<!-- lab-row: {match[1]} -->\n{note}\n\n{table(results, [*plain, *arms])}\n<!-- /lab-row -->"
        page.write_text(text[: match.start()] + filled + text[match.end() :])
    print(table(results, results.arms))


if __name__ == "__main__":
    main()
