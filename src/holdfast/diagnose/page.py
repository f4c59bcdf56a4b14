"""A diagnosis as one HTML file that needs nothing else; every text from outside is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from holdfast.diagnose.figures import Figure, figures
from holdfast.files import write_text

STYLE = """
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; color: #17212b; }
body { font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p.quiet, figcaption { color: #5b6b78; } figure { margin: 0 0 2rem; } .plot { height: 400px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #dfe5ea; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .pseudo { color: #0b6e75; } .actual { color: #c4511d; }
.pseudo, .actual, .none { font-weight: 600; } .warning { border-left: 3px solid #c4511d; padding-left: .8rem; }
"""


def write_page(result: Mapping[str, Any], path: Path, other: Mapping[str, Any] | None = None) -> Path:
    """Write the page of a diagnosis (``diagnosis.json``); ``other`` is a second model's, drawn as Figure 6."""
    write_text(path, render(result, other))
    return path


def render(result: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> str:
    """The page's HTML."""
    from plotly.offline import get_plotlyjs

    base = str(result["base"]["source"])
    drawn = figures(result, other)
    body = [
        f"<h1>Is the knowledge gone, or has its format shifted?</h1><p class=quiet>Base: {escape(base)}</p>",
        *(f"<p class=warning>{escape(warning)}</p>" for warning in result["warnings"]),
        _verdicts(result),
        _stages(result),
        _advice(result),
        *(_figure(index, figure) for index, figure in enumerate(drawn)),
        _text(result),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width'><title>Diagnosis of {escape(base)}</title>"
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(body)}</body></html>\n"
    )


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or start a comment."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure(index: int, figure: Figure) -> str:
    return (
        f"<h2>{escape(figure.title)}</h2><figure><div class=plot id=f{index}></div>"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        f"<script>Plotly.newPlot('f{index}', {script_json(figure.data)}, {script_json(figure.layout)}, "
        "{responsive: true, displaylogo: false});</script>"
    )


def _points(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` are HTML cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _verdicts(result: Mapping[str, Any]) -> str:
    rows = []
    for point in result["checkpoints"]:
        for task, found in point["decomposition"].items():
            if task == "pooled" and len(result["tasks"]) == 1:
                continue
            verdict = escape(found["verdict"])
            rows.append(
                [
                    escape(point["name"]),
                    escape(task),
                    f"<span class={verdict}>{verdict}</span>",
                    _points(found["drop"]),
                    _points(found["pattern_shift"]),
                    _points(found["knowledge_loss"]),
                    _points(found["control"]),
                    str(found["items"]),
                    str(found["items_needed"] or "–"),
                ]
            )
    header = ("checkpoint", "benchmark", "verdict", "drop", "pattern shift", "knowledge loss", "control", "items")
    note = (
        "<p class=quiet>Points with 95 % intervals, paired by item. Drop = base − tuned = pattern shift (restored − "
        "tuned) + knowledge loss (base − restored). Control: base − base restored. Last column: items at which an "
        "undecided verdict would fall, if the measured differences are the true ones.</p>"
    )
    return f"<h2>Verdicts</h2>{_table((*header, 'would decide'), rows)}{note}"


def _stages(result: Mapping[str, Any]) -> str:
    marks, names = result["marks"], [point["name"] for point in result["checkpoints"]]

    def at(index: int | None) -> str:
        return "not reached" if index is None else f"from {names[index]} on"

    actual = "from the first judged checkpoint on" if marks["actual_throughout"] else at(marks["actual_from"])
    lines = (
        f"Format alignment (label mass above 0.95): {at(marks['format_aligned'])}",
        f"Entropy over the choices in steady decline: {at(marks['entropy_declines'])}",
        f"Actual forgetting: {actual}",
    )
    return "<h2>Stages</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _advice(result: Mapping[str, Any]) -> str:
    parts = [f"<p>{escape(line)}</p>" for line in result["advice"]]
    for point in result["checkpoints"]:
        lines = "".join(f"<li>{escape(line)}</li>" for line in point["advice"]["pooled"])
        parts.append(f"<details><summary>{escape(point['name'])}</summary><ul>{lines}</ul></details>")
    return f"<h2>What to do</h2>{''.join(parts)}"


def _text(result: Mapping[str, Any]) -> str:
    text = result["text"]
    rows = [
        [name, f"{text[name]['passages']:,}", f"{text[name]['tokens']:,}", _number(text[name]["highest_perplexity"])]
        for name in ("restoring", "probing")
    ]
    contamination = text["contamination"]
    settings = escape(json.dumps(result["restoring"], ensure_ascii=False))
    return (
        f"<h2>Restoring text</h2><p>{escape(str(text['corpus']))}: {text['passages']:,} passages ranked by the base's "
        f"perplexity; {contamination['passages']:,} hold benchmark text.</p>"
        f"{_table(('set', 'passages', 'tokens', 'highest perplexity'), rows)}<p class=quiet>Restoring: {settings}</p>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
