"""``holdfast check``: fail a build when a checkpoint lost more than its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.options import BatchTokens, Cache, Dtype, Limit, LocalData, RunCode


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def check(
        before: Annotated[str, typer.Argument(help="A model, or a results folder of eval or lm-eval.")],
        after: Annotated[str, typer.Argument(help="The same, of the new checkpoint.")],
        max_drop: Annotated[float, typer.Option(min=0.0, help="Points a task may lose.")] = 1.0,
        panel: Annotated[str | None, typer.Option(help="paper1, sfa, quick or lab; needed to measure models.")] = None,
        local_data: LocalData = None,
        limit: Limit = None,
        max_perplexity_rise: Annotated[
            float | None, typer.Option(min=0.0, help="Percent a perplexity may rise (default: shown, not gated).")
        ] = None,
        alpha: Annotated[float, typer.Option(help="Chance to fail an unchanged model, over all tasks.")] = 0.05,
        strict: Annotated[bool, typer.Option("--strict", help="Also fail where too few items leave it open.")] = False,
        markdown: Annotated[Path | None, typer.Option(help="Write the summary as Markdown.")] = None,
        junit: Annotated[Path | None, typer.Option(help="Write the summary as JUnit XML.")] = None,
        dtype: Dtype = "float32",
        batch_tokens: BatchTokens = None,
        run_code: RunCode = False,
        cache: Cache = None,
    ) -> None:
        """Compare two checkpoints item by item; exit 1 if a drop is shown to be beyond the budget."""
        from rich.console import Console

        from holdfast.cli.scores import gate_table
        from holdfast.evaluate.command import Request, both_sides
        from holdfast.evaluate.gate import compare
        from holdfast.evaluate.gate_report import explain, headline, write_junit, write_markdown
        from holdfast.study.quiet import quiet_libraries

        quiet_libraries()
        request = Request(panel, local_data, limit, dtype, batch_tokens, run_code, cache)
        tables = both_sides(before, after, request, lambda message: typer.echo(f"{message} …", err=True))
        report = compare(*tables, max_drop, alpha=alpha, max_perplexity_rise=max_perplexity_rise)
        Console().print(gate_table(report))
        for row in report.rows:
            if text := explain(row):
                typer.echo(f"{row.name}: {text}")
        typer.echo(headline(report))
        if markdown is not None:
            write_markdown(markdown, report, before, after)
        if junit is not None:
            write_junit(junit, report)
        if report.failed or (strict and report.unclear):
            raise typer.Exit(1)
