"""Rich tables of studies."""

from __future__ import annotations

import math
import os

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from holdfast.results import Results

WIDTH = 120  # columns where the output is no terminal


def study_table(study: Results, stacked: bool = False) -> Table:
    """One row per arm: each task when taught and at the end, the panel, average, forgetting, time.

    ``stacked`` puts "→ end" below "taught", for narrow terminals.
    """
    runs = study.runs()
    seeds = len(study.seeds)
    spread = f"mean ± half the range over {seeds} seeds" if seeds > 1 else f"seed {study.seeds[0]}"
    title = f"{study.data['name']}: {spread}"
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, show_lines=stacked)
    table.add_column("arm", no_wrap=True)
    for task in study.tasks:
        table.add_column(f"{task}\ntaught→end", justify="right")
    for name in study.panel:
        metric = "ppl" if study.metric(name) == "perplexity" else "%"
        table.add_column(f"{name} {metric}\nbase→end", justify="right")
    for header in ("average", "forgetting\n(drop)", "panel\ndrop", "time"):
        table.add_column(header, justify="right")
    for arm in study.arms:
        rows = runs.loc[[arm]]
        arrow = "\n→" if stacked else "→"
        cells = [pair(rows[f"{t} taught"], rows[f"{t} end"], arrow) for t in study.tasks]
        cells += [pair(rows[f"{n} before"], rows[f"{n} after"], arrow) for n in study.panel]
        cells += [cell(rows[c]) for c in ("average", "forgetting (drop)", "panel drop")]
        table.add_row(arm, *cells, f"{rows['seconds'].mean():.0f} s")
    return table


def cell(values: pd.Series[float]) -> str:
    """Mean, and half the range where there are several seeds."""
    mean = values.mean()
    if math.isnan(mean):
        return "—"
    half = (values.max() - values.min()) / 2
    return f"{mean:.1f} ±{half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def pair(before: pd.Series[float], after: pd.Series[float], arrow: str = "→") -> str:
    """``before→after``; only the end where there was no before."""
    if math.isnan(before.mean()):
        return cell(after)
    start = cell(before) if before.std(ddof=0) > 0 else f"{before.mean():.1f}"
    return f"{start}{arrow}{cell(after)}"


def print_study(study: Results) -> None:
    """The table, what it means, and what it can't tell."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDTH)
    table = study_table(study)
    narrow = console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width
    console.print(study_table(study, stacked=True) if narrow else table)
    console.print(
        f"Scores in % (ppl: perplexity). drop = score when taught (panel: base) − score at the end. "
        f"{study.trainings} trainings in all; arms share what they have in common; time counts shared steps in full.",
        style="dim",
        markup=False,
    )
    for warning in study.warnings():
        console.print(f"Note: {warning}", style="yellow", markup=False)
