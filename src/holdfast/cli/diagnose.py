"""``holdfast diagnose``: is the knowledge gone, or has only its format shifted?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from holdfast.diagnose.request import Request

Words = Annotated[list[str] | None, typer.Argument(hidden=True)]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def diagnose(
        more: Words = None,
        base: Annotated[str | None, typer.Option(help="The model before tuning.")] = None,
        checkpoints: Annotated[
            list[str] | None, typer.Option(help="Tuned models, in the order of training: C1 C2 …")
        ] = None,
        corpus: Annotated[
            str | None, typer.Option(help="Plain text like the pretraining text: files, a folder, lab, or a hub id.")
        ] = None,
        panel: Annotated[str | None, typer.Option(help="Questions to ask: a named panel.")] = None,
        out: Annotated[Path | None, typer.Option(help="Folder of the diagnosis; an existing one is continued.")] = None,
        local_data: Annotated[Path | None, typer.Option(help="Files of the panel's tasks, where no hub is.")] = None,
        limit: Annotated[int | None, typer.Option(help="Items per task.")] = None,
        tuned_on: Annotated[
            str | None, typer.Option(help="The tuning data: its size is the text budget, and memorization is measured.")
        ] = None,
        tokens: Annotated[int | None, typer.Option(help="Tokens to restore with (default: one epoch).")] = None,
        methods: Annotated[
            list[str] | None, typer.Option("--method", help="Restore with a method: 'sfa p=0.25'. Repeatable.")
        ] = None,
        lr: Annotated[float, typer.Option(help="Learning rate of restoring.")] = 3e-5,
        batch_size: Annotated[int, typer.Option(help="Blocks of text per step of restoring.")] = 16,
        max_length: Annotated[int, typer.Option(help="Tokens of a block.")] = 512,
        seed: Annotated[int, typer.Option(help="Order of the restoring text.")] = 0,
        column: Annotated[str, typer.Option(help="Column that holds the text, where the corpus is a table.")] = "text",
        passage_words: Annotated[int, typer.Option(help="Words of a passage.")] = 200,
        passages: Annotated[int | None, typer.Option(help="Rank only so many, from the start of the corpus.")] = None,
        ngram: Annotated[int, typer.Option(help="Words that a passage and a question share to count as overlap.")] = 13,
        keep_contaminated: Annotated[bool, typer.Option(help="Restore with text that overlaps the panel too.")] = False,
        discard_restored: Annotated[bool, typer.Option(help="Delete restored weights once they are measured.")] = False,
        tolerance: Annotated[
            float, typer.Option(help="How far above the base's the perplexity may stay, as a share.")
        ] = 0.1,
        margin: Annotated[float, typer.Option(help="The smallest drop that matters, as a share of the items.")] = 0.02,
        compare: Annotated[Path | None, typer.Option(help="A second diagnosis, drawn as Figure 6.")] = None,
        samples: Annotated[
            bool, typer.Option("--samples", help="Judge lm-eval sample files: BASE TUNED RESTORED [CONTROL].")
        ] = False,
        metric: Annotated[str | None, typer.Option(help="With --samples: the metric of the files.")] = None,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
    ) -> None:
        """Split every drop into pattern shift and knowledge loss, with a verdict, along a run's checkpoints."""
        if samples:
            _judge_samples(list(more or []), metric, margin)
            return
        from holdfast.diagnose.request import Request

        needed = {"--base": base, "--checkpoints": checkpoints, "--corpus": corpus, "--panel": panel, "--out": out}
        _need(needed)
        assert base and checkpoints and corpus and panel and out
        from holdfast.cli.restore import restoring, tuning_data

        request = Request(
            base=base,
            checkpoints=(*checkpoints, *(more or [])),
            corpus=corpus,
            tasks=tuple(_panel(panel, local_data, limit)),
            tuning=tuning_data(tuned_on),
            tokens=tokens,
            column=column,
            passage_words=passage_words,
            passages=passages,
            ngram=ngram,
            keep_contaminated=keep_contaminated,
            keep_restored=not discard_restored,
            tolerance=tolerance,
            margin=margin,
            **restoring(lr, batch_size, max_length, seed, methods),
        )
        _diagnose(request, out, compare, quiet)


def _need(options: dict[str, Any]) -> None:
    from holdfast.errors import UserError

    missing = [name for name, value in options.items() if not value]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}")


def _panel(name: str, local_data: Path | None, limit: int | None) -> Any:
    from holdfast.evaluate.panels import load_panel

    return load_panel(name, local_data=local_data, limit=limit)


def _diagnose(request: Request, out: Path, compare: Path | None, quiet: bool) -> None:
    from rich.console import Console

    from holdfast.diagnose.diagnosis import diagnose
    from holdfast.diagnose.page import write_page
    from holdfast.study.quiet import quiet_libraries

    quiet_libraries()
    log = Console(stderr=True)
    other = _read(compare) if compare else None

    def say(message: str) -> None:
        if not quiet:
            log.print(f"{message} …", markup=False, highlight=False)

    try:
        result = diagnose(request, out, say=say)
    except KeyboardInterrupt:
        log.print(f"interrupted; what was finished is in {out}, the same command continues", markup=False)
        raise typer.Exit(130) from None
    page = write_page(result, out / "diagnosis.html", other)
    _print(result)
    typer.echo(f"\nPage: {page}    Numbers: {out / 'diagnosis.json'}    Per item: {out / 'items.parquet'}")


def _read(folder: Path) -> dict[str, Any]:
    from holdfast.errors import UserError

    file = folder / "diagnosis.json" if folder.is_dir() else folder
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a finished diagnosis: {error}") from error


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("checkpoint", "verdict", title="pooled over the benchmarks, points with 95 % intervals")
    for name in ("drop", "pattern shift", "knowledge loss", "control", "perplexity, restored"):
        table.add_column(name, justify="right")
    for point in result["checkpoints"]:
        found = point["decomposition"]["pooled"]
        parts = [_points(found[key]) for key in ("drop", "pattern_shift", "knowledge_loss", "control")]
        perplexity = f"{point['tuned']['perplexity']:.2f} → {point['restored']['perplexity']:.2f}"
        table.add_row(Text(point["name"]), found["verdict"], *parts, perplexity)
    console = Console()
    console.print(table)
    console.print(f"probe perplexity of the base: {result['base']['perplexity']:.2f}", markup=False, highlight=False)
    last = result["checkpoints"][-1]
    for line in [*result["warnings"], *result["advice"], *last["advice"]["pooled"]]:
        console.print(f"- {line}", markup=False, highlight=False)


def _points(interval: dict[str, float]) -> str:
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _judge_samples(folders: list[str], metric: str | None, margin: float) -> None:
    from rich.console import Console

    from holdfast.diagnose.advice import advice
    from holdfast.diagnose.samples import decompose_samples
    from holdfast.errors import UserError

    if len(folders) not in (3, 4):
        raise UserError("--samples takes three or four files or folders: BASE TUNED RESTORED [CONTROL]")
    found = decompose_samples(*folders, metric=metric, margin=margin)
    console = Console()
    for task, decomposition in found.items():
        if task != "pooled" or len(found) > 2:
            console.print(f"{task}: {decomposition}", markup=False, highlight=False)
    for line in advice(found["pooled"]):
        console.print(f"- {line}", markup=False, highlight=False)
