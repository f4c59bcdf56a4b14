"""A sweep's outputs on a panel of tasks, and the plane of two of them (papers/sfa, Figs. 7 and 8)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError, did_you_mean
from holdfast.merge.publish import write_json

if TYPE_CHECKING:
    import pandas as pd

    from holdfast.merge.checkpoints import MergeResult

Score = Callable[[Path], "pd.DataFrame"]  # folder -> summary with task, metric, value, low, high


def front(points: Mapping[str, Sequence[float]]) -> list[str]:
    """Labels that no other point beats: none is at least as good everywhere and better somewhere (higher is better)."""
    return [
        label
        for label, mine in points.items()
        if not any(
            all(a >= b for a, b in zip(other, mine)) and any(a > b for a, b in zip(other, mine))
            for name, other in points.items()
            if name != label
        )
    ]


def evaluate_sweep(
    result: MergeResult, panel: str | Score, axes: tuple[str, str] | None = None, limit: int | None = None
) -> pd.DataFrame:
    """Score every output of a sweep; writes pareto.csv and pareto.html into the sweep's folder and returns the table.

    ``panel`` is a panel's name (see ``holdfast eval``) or a function from a model folder to a summary. One row per
    output: the value of every task, and whether the output lies on the Pareto front of the two ``axes`` (by default the
    panel's first two tasks). Perplexities count as lower is better. Outputs already scored are not scored again.
    """
    import pandas as pd

    score = _panel(panel, limit) if isinstance(panel, str) else panel
    rows: dict[str, dict[str, float]] = {}
    metrics: dict[str, str] = {}
    for label, folder in result.outputs.items():
        summary = score(folder)
        rows[label] = dict(zip(summary["task"], summary["value"]))
        metrics.update(zip(summary["task"], summary["metric"]))
    table = pd.DataFrame(rows).T
    x, y = _axes(list(table.columns), axes)
    signs = [-1 if metrics[name] == "perplexity" else 1 for name in (x, y)]
    points = {label: [sign * row[name] for sign, name in zip(signs, (x, y))] for label, row in rows.items()}
    best = set(front(points))
    table["front"] = [label in best for label in table.index]
    table.index.name = "output"
    table.to_csv(result.out / "pareto.csv")
    _plot(table, x, y, metrics, result)
    record = json.loads((result.out / "sweep.json").read_text(encoding="utf-8"))
    write_json(result.out / "sweep.json", {**record, "axes": [x, y], "scores": rows, "front": sorted(best)})
    return table


def _panel(name: str, limit: int | None) -> Score:
    from holdfast.evaluate.command import Request, evaluate
    from holdfast.evaluate.summary import summarize

    def score(folder: Path) -> pd.DataFrame:
        items, _ = evaluate(str(folder), Request(name, limit=limit), lambda _: None)
        return summarize(items)

    return score


def _axes(tasks: list[str], axes: tuple[str, str] | None) -> tuple[str, str]:
    if axes is None:
        if len(tasks) < 2:
            raise UserError(f"the Pareto plane needs two tasks, the panel has {len(tasks)}.")
        return tasks[1], tasks[0]
    for name in axes:
        if name not in tasks:
            raise UserError(f"the panel has no task '{name}'.{did_you_mean(name, tasks)}")
    return axes


def _plot(table: pd.DataFrame, x: str, y: str, metrics: Mapping[str, Any], result: MergeResult) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(
        x=table[x], y=table[y], mode="lines+markers+text", text=list(table.index), textposition="top center"
    )
    chosen = table[table["front"]]
    ring = {"size": 16, "symbol": "circle-open", "line": {"width": 2}}
    figure.add_scatter(x=chosen[x], y=chosen[y], mode="markers", marker=ring, name="Pareto front")
    figure.update_layout(
        title=f"{result.plan.method}: {result.plan.family.formula}", showlegend=False, template="plotly_white",
        xaxis_title=f"{x} ({metrics[x]})", yaxis_title=f"{y} ({metrics[y]})",
    )  # fmt: skip
    figure.write_html(result.out / "pareto.html", include_plotlyjs=True)
