"""A gate's outcome for people (Markdown) and for CI (JUnit XML)."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from holdfast.evaluate.gate import GateReport, GateRow
from holdfast.files import write_text

WORDS = {"ok": "within budget", "unclear": "can't tell", "fail": "DROP", "shown": "not gated"}


def headline(report: GateReport) -> str:
    """One line: what was found."""
    failed = [row for row in report.rows if row.verdict == "fail"]
    if failed:
        worst = max(failed, key=lambda row: row.low - row.budget)
        return f"FAILED: {worst.name} lost {_points(worst.drop, worst)} (at least {_points(worst.low, worst)})"
    if report.unclear:
        return (
            f"passed: no drop beyond {report.max_drop:g} points was shown, but the panel is too small to rule one out"
        )
    return f"passed: every drop is within {report.max_drop:g} points"


def explain(row: GateRow) -> str:
    """What the comparison can and can't say, in one sentence; empty if the verdict says it all."""
    if row.verdict == "fail":
        return (
            f"lost {_points(row.drop, row)}; at least {_points(row.low, row)} beyond item noise, budget {row.budget:g}"
        )
    if row.verdict == "unclear" and row.too_small:
        return (
            f"{row.n} items are too few for a budget of {row.budget:g}: an unchanged model would need about "
            f"{row.needed}; smallest drop caught 4 times of 5: {row.smallest:.1f} points"
        )
    if row.verdict == "unclear":
        return f"the drop could be as large as {_points(row.high, row)}, budget {row.budget:g}"
    return ""


def markdown(report: GateReport, before: str = "before", after: str = "after") -> str:
    """The summary as Markdown: headline, one table, and what the panel was too small to see."""
    lines = [
        f"# holdfast check: {headline(report)}",
        "",
        f"before: `{before}`  ",
        f"after: `{after}`  ",
        f"budget: {report.max_drop:g} points; family-wise level {100 * report.alpha:g} %",
        "",
        "| task | n | before | after | drop | interval | lost / won | smallest drop seen | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report.rows:
        smallest = "–" if math.isnan(row.smallest) else f"{row.smallest:.1f}"
        unit = " %" if row.metric == "perplexity" else ""
        lines.append(
            f"| {row.name} ({row.metric}) | {row.n} | {row.before:.2f} | {row.after:.2f} | {row.drop:+.2f}{unit} "
            f"| {row.low:+.2f} … {row.high:+.2f} | {row.lost} / {row.won} | {smallest} | {WORDS[row.verdict]} |"
        )
    notes = [f"- {row.name}: {text}" for row in report.rows if (text := explain(row))]
    if report.skipped:
        notes.append(f"- {report.skipped} items could not be scored by both sides and were left out.")
    notes += [f"- {note}" for note in report.notes]
    lines += ["", *notes] if notes else []
    lines += [
        "",
        "drop: points lost (perplexity: percent risen). interval: one-sided bounds, each at the task's share of the "
        "level; the check fails if a lower bound exceeds the budget. smallest drop seen: caught 4 times of 5.",
    ]
    return "\n".join(lines) + "\n"


def junit(report: GateReport) -> str:
    """The same as JUnit XML: one test case per comparison, a failure where the budget is exceeded."""
    failed = sum(row.verdict == "fail" for row in report.rows)
    suite = ElementTree.Element(
        "testsuite", name="holdfast check", tests=str(len(report.rows)), failures=str(failed), errors="0", skipped="0"
    )
    for row in report.rows:
        case = ElementTree.SubElement(suite, "testcase", classname="holdfast.check", name=row.name)
        detail = explain(row)
        if row.verdict == "fail":
            ElementTree.SubElement(case, "failure", message=detail, type="drop").text = _numbers(row)
        else:
            ElementTree.SubElement(case, "system-out").text = "\n".join(filter(None, [detail, _numbers(row)]))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def write_markdown(path: Path, report: GateReport, before: str = "before", after: str = "after") -> None:
    """Write `markdown` to a file."""
    write_text(path, markdown(report, before, after))


def write_junit(path: Path, report: GateReport) -> None:
    """Write `junit` to a file."""
    write_text(path, junit(report))


def _points(value: float, row: GateRow) -> str:
    return f"{value:.2f} %" if row.metric == "perplexity" else f"{value:.2f} points"


def _numbers(row: GateRow) -> str:
    return (
        f"n {row.n}; before {row.before:.3f}; after {row.after:.3f}; drop {row.drop:.3f}; "
        f"bounds {row.low:.3f} to {row.high:.3f} at level {row.alpha:.4f} each; lost {row.lost}, won {row.won}"
    )
