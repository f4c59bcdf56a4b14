"""``holdfast eval``: score a model on a panel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.options import BatchTokens, Cache, Dtype, Limit, LocalData, RunCode


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("eval")
    def evaluate_model(
        model: Annotated[str, typer.Argument(help="A model: folder, .gguf file, hub id, or lab.")],
        panel: Annotated[str, typer.Option(help="paper1, sfa, quick or lab.")] = "quick",
        local_data: LocalData = None,
        limit: Limit = None,
        out: Annotated[Path | None, typer.Option(help="Folder for items.parquet, summary.json, summary.md.")] = None,
        dtype: Dtype = "float32",
        batch_tokens: BatchTokens = None,
        run_code: RunCode = False,
        cache: Cache = None,
    ) -> None:
        """Score a model on a panel; every value with its 95 % interval."""
        from rich.console import Console

        from holdfast.cli.scores import score_table
        from holdfast.evaluate.command import Request, evaluate
        from holdfast.evaluate.store import save_results
        from holdfast.evaluate.summary import summarize
        from holdfast.study.quiet import quiet_libraries

        quiet_libraries()
        request = Request(panel, local_data, limit, dtype, batch_tokens, run_code, cache)
        items, about = evaluate(model, request, lambda message: typer.echo(f"{message} …", err=True))
        summary = summarize(items) if out is None else save_results(out, items, about)
        Console().print(score_table(summary, f"{model} on {panel}"))
        for row in items[items["error"] != ""].to_dict("records"):
            typer.echo(f"{row['task']}, item {row['item']}: {row['error']}", err=True)
        if out is not None:
            typer.echo(f"Results: {out}")
