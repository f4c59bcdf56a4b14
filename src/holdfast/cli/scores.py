"""Rich tables of scores and gates."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from holdfast.evaluate.gate import GateReport
from holdfast.evaluate.gate_report import WORDS

STYLES = {"fail": "bold red", "unclear": "yellow", "ok": "green", "shown": ""}


def score_table(summary: pd.DataFrame, title: str) -> Table:
    """Task, value and interval."""
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for name in ("metric", "value", "95 % interval", "n", "chance", "errors", "truncated"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in summary.itertuples():
        interval = f"{row.low:.2f} – {row.high:.2f}"
        counts = [str(row.n), f"{row.chance:g}", str(row.errors), str(row.truncated)]
        table.add_row(str(row.task), str(row.metric), f"{row.value:.2f}", interval, *counts)
    return table


def gate_table(report: GateReport) -> Table:
    """One row per comparison, drops in points (perplexity: rise in percent)."""
    table = Table(title=f"drop, budget {report.max_drop:g} points", title_justify="left")
    table.add_column("task")
    for name in ("n", "before", "after", "drop", "low", "high", "smallest seen"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in report.rows:
        smallest = "–" if row.smallest != row.smallest else f"{row.smallest:.1f}"
        numbers = [f"{value:.2f}" for value in (row.before, row.after, row.drop, row.low, row.high)]
        table.add_row(row.name, str(row.n), *numbers, smallest, WORDS[row.verdict], style=STYLES[row.verdict])
    return table
