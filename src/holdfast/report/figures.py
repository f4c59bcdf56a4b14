"""Plotly figures of a study, as HTML fragments that need the page's one copy of plotly.js."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import plotly.graph_objects as go

from holdfast.results import LOWER_IS_BETTER, Results

COLORS = ("#0b6e75", "#d1495b", "#edae49", "#30638e", "#8d6a9f", "#5a8f29", "#a0522d", "#667788")
LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
    "font": {"family": "system-ui, sans-serif", "size": 13},
}


def fragment(figure: go.Figure) -> str:
    """The figure as HTML. Plotly reads markup in labels (links among it), so every text is escaped first."""
    figure = go.Figure(_escaped(json.loads(figure.to_json())))
    return figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "displayModeBar": False}
    )


def _escaped(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _escaped(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_escaped(v, key) for v in value]
    if isinstance(value, str) and key not in {"hovertemplate", "texttemplate"}:
        return escape(value, quote=False)
    return value


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def heat_map(results: Results, arm: str) -> str:
    """R[i, j] of one arm, mean over seeds: the base model first, the panel's accuracies beside the tasks."""
    columns = results.tasks + [name for name in results.panel if results.metric(name) not in LOWER_IS_BETTER]
    frames = [
        results.matrix(arm, seed).join(results.abilities(arm, seed), how="left")[columns] for seed in results.seeds
    ]
    mean = sum(frames[1:], frames[0]) / len(frames)
    rows = ["base", *(f"after {name}" for name in mean.index)]
    values = [[float(results.base()[c]) for c in columns], *mean.to_numpy().tolist()]
    figure = go.Figure(
        go.Heatmap(
            z=values, x=columns, y=rows, zmin=0, zmax=100, colorscale="Teal", texttemplate="%{z:.1f}", showscale=False
        )
    )
    figure.update_layout(**LAYOUT, title=arm, width=200 + 90 * len(columns), height=130 + 45 * len(rows))
    figure.update_yaxes(autorange="reversed")
    return fragment(figure)


def pareto(results: Results) -> str:
    """Last task learned against everything else kept, one point per arm and seed."""
    figure = go.Figure()
    earlier = results.tasks[:-1]
    accuracies = [name for name in results.panel if results.metric(name) not in LOWER_IS_BETTER]
    runs = results.runs()
    for index, arm in enumerate(results.arms):
        rows = runs.loc[[arm]]
        kept = rows[[f"{t} end" for t in earlier] + [f"{n} after" for n in accuracies]].mean(axis=1)
        learned = rows[f"{results.tasks[-1]} end"]
        marker = {"size": 11, "color": _color(index)}
        text = [f"seed {seed}" for seed in results.seeds]
        figure.add_scatter(x=learned.to_list(), y=kept.to_list(), mode="markers", name=arm, marker=marker, text=text)
    figure.update_layout(**LAYOUT, height=420)
    figure.update_xaxes(title=f"{results.tasks[-1]} at the end (%)")
    figure.update_yaxes(title="earlier tasks and panel at the end, mean (%)")
    return fragment(figure)


def curves(results: Results) -> str:
    """Each task's and panel score through the stream, one figure per score, one line per arm (mean over seeds)."""
    figures = []
    base = results.base()
    for name in [*results.tasks, *results.panel]:
        figure = go.Figure()
        for index, arm in enumerate(results.arms):
            frames = [results.matrix(arm, s).join(results.abilities(arm, s)) for s in results.seeds]
            mean = sum((frame[name] for frame in frames[1:]), frames[0][name]) / len(frames)
            joint = len(mean) == 1 and mean.index[0] not in results.tasks
            x = [f"after {results.tasks[-1]}"] if joint else ["base", *(f"after {row}" for row in mean.index)]
            y = mean.to_list() if joint else [float(base[name]), *mean.to_list()]
            figure.add_scatter(
                x=x, y=y, name=arm, mode="markers" if joint else "lines+markers", line={"color": _color(index)}
            )
        order = ["base", *(f"after {task}" for task in results.tasks)]
        unit = "perplexity" if results.metric(name) == "perplexity" else f"{results.metric(name)} (%)"
        figure.update_layout(**LAYOUT, title=name, width=480, height=330)
        figure.update_xaxes(categoryorder="array", categoryarray=order)
        figure.update_yaxes(title=unit)
        figures.append(fragment(figure))
    return f'<div class="figures">{"".join(figures)}</div>'


def loss_curves(results: Results) -> str:
    """Training loss per step of every training, named by the arms that use it."""
    users: dict[str, list[str]] = {}
    for arm in results.arms:
        for seed in results.seeds:
            for key in results.data["arms"][arm][str(seed)]["trainings"]:
                users.setdefault(key, []).append(arm if len(results.seeds) == 1 else f"{arm}/{seed}")
    figure = go.Figure()
    for key, step in results.data["steps"].items():
        logged = [(entry["step"], entry["loss"]) for entry in step.get("history", []) if "loss" in entry]
        if not logged:
            continue
        name = f"{' + '.join(step['tasks'])}: {', '.join(users.get(key, []))}"
        figure.add_scatter(x=[s for s, _ in logged], y=[loss for _, loss in logged], name=name[:80], mode="lines")
    figure.update_layout(**LAYOUT, height=420)
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title="loss (nats per token)", type="log")
    return fragment(figure)
