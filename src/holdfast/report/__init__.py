"""Results -> one self-contained HTML file; imports neither torch nor training."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from holdfast.files import write_text
from holdfast.report.figures import curves, heat_map, loss_curves, pareto
from holdfast.report.page import STYLE, section, table_html
from holdfast.results import Results

__all__ = ["report_html", "write_report"]


def write_report(data: dict[str, Any], path: str | Path) -> Path:
    """Write the report of a study (the contents of its ``study.json``) to ``path``, whole or not at all."""
    target = Path(path)
    write_text(target, report_html(data))
    return target


def report_html(data: dict[str, Any]) -> str:
    """The whole page: findings, table, Pareto plane, forgetting matrices, curves, and how it was made."""
    from plotly.offline import get_plotlyjs

    results = Results(data)
    parts = [
        f"<h1>{escape(data['name'])}: what was learned, what was kept</h1>",
        _lead(results),
        section("Arms", _explain_table(results) + table_html(summary(results))),
        _notes(results),
        section(
            "Learning against keeping",
            "<p>Each point is one arm and seed: how well the last task was learned, and how much of all before it was "
            "kept. Up and right is better.</p>" + pareto(results),
        ),
        section(
            "Forgetting matrices",
            "<p>Score on each column's task after the row's task was taught; the base model is the first row.</p>"
            + '<div class="figures">'
            + "".join(heat_map(results, arm) for arm in results.arms)
            + "</div>",
        ),
        section("Through the stream", curves(results)),
        section("Training loss", loss_curves(results)),
        section("How this was made", _made(data)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data['name'])} · holdfast</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>{''.join(parts)}</main></body></html>"
    )


def summary(results: Results) -> list[list[str]]:
    """Header and rows of the arms' table as text: mean, and (min – max) over several seeds."""
    runs = results.runs()
    header = ["arm", *runs.columns]
    rows = []
    for arm in results.arms:
        cells = [_cell(runs.loc[[arm], column].to_list()) for column in runs.columns]
        rows.append([arm, *cells])
    return [header, *rows]


def _cell(values: list[float]) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "—"
    mean = f"{sum(known) / len(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.1f} – {max(known):.1f})"


def _lead(results: Results) -> str:
    tasks = " → ".join(escape(task) for task in results.tasks)
    seeds = f"{len(results.seeds)} seed{'s' if len(results.seeds) > 1 else ''}"
    return (
        f"<p class=lead>{escape(str(results.data['recipe']['model']))} was taught {tasks}; {len(results.arms)} arms, "
        f"{seeds}, {results.trainings} trainings.</p>"
    )


def _explain_table(results: Results) -> str:
    several = " Ranges are over seeds, not item noise." if len(results.seeds) > 1 else ""
    return (
        "<p>Scores in percent, perplexities as they are. <b>Forgetting (drop)</b>: taught − end, mean "
        "over the tasks before the last. <b>Panel drop</b>: base − end, mean over the panel's accuracies. "
        f"<b>seconds</b>: training and merging, shared steps counted in full.{several}</p>"
    )


def _notes(results: Results) -> str:
    warnings = results.warnings()
    if len(results.seeds) == 1:
        warnings.append("One seed: differences between arms may be luck. Three or more show the spread.")
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return section("What this study can't tell", f"<ul>{items}</ul>")


def _made(data: dict[str, Any]) -> str:
    environment = data["environment"]
    versions = {"holdfast": environment["holdfast"], "python": environment["python"], **environment["versions"]}
    hardware = f"{environment['cpus']} CPUs, {environment['memory_gib']} GiB, " + (
        ", ".join(environment["accelerators"]) or "no accelerator"
    )
    import yaml

    recipe = yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True)
    rows = [["package", "version"], *([name, str(version)] for name, version in versions.items())]
    folded = f"<details><summary>Recipe</summary><pre>{escape(recipe)}</pre></details>"
    return f"<p>{escape(hardware)}</p>{table_html(rows)}{folded}"
