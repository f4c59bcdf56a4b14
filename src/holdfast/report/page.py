"""The bare parts of the page; everything that comes from users is escaped."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light; --ink: #17212b; --quiet: #5b6b78; --line: #dfe5ea; --sea: #0b6e75; }
body { margin: 0; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; background: #fff; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid var(--sea); padding-bottom: .2rem; }
p.lead { color: var(--quiet); margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: .85rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
"""


def section(title: str, body: str) -> str:
    """A titled part of the page; ``body`` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table_html(rows: list[list[str]]) -> str:
    """A table from text cells, the first row its header; every cell is escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
