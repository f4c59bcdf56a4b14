"""``holdfast landscape``: loss surfaces, flatness and sharpness of a model on a task."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from holdfast.landscape.request import Request, Result


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def landscape(
        model: Annotated[str, typer.Argument(help="Model: hub id, folder, .gguf file, or 'lab'.")],
        data: Annotated[str, typer.Option(help="Examples: a file, a hub data set, or lab:math, lab:law, lab:code.")],
        grid: Annotated[int, typer.Option(help="Points per side; odd.")] = 21,
        range_: Annotated[
            float | None, typer.Option("--range", help="α and β run from -range to range. [default: 1.0]")
        ] = None,
        directions: Annotated[
            str, typer.Option(help="filter, gaussian (the paper's), plane (two --checkpoint) or pca (several).")
        ] = "filter",
        checkpoint: Annotated[
            list[str] | None, typer.Option(help="A checkpoint folder, for plane, pca and --line; repeat it.")
        ] = None,
        seeds: Annotated[int, typer.Option(help="Random planes; one plane is an anecdote.")] = 3,
        seed: Annotated[int, typer.Option(help="First direction seed, and the seed of the subset.")] = 0,
        line: Annotated[bool, typer.Option("--line", help="Only scan the line to --checkpoint.")] = False,
        rho: Annotated[float | None, typer.Option(help="Also the worst-case and average rise at this radius.")] = None,
        hessian: Annotated[bool, typer.Option("--hessian", help="Also the Hessian's trace and eigenvalues.")] = False,
        examples: Annotated[int, typer.Option(help="Rows in the fixed, seeded subset.")] = 64,
        max_length: Annotated[int, typer.Option(help="Tokens per row at most.")] = 512,
        prompt: Annotated[str | None, typer.Option(help="Prompt template over the file's columns.")] = None,
        completion: Annotated[str | None, typer.Option(help="Completion template over the file's columns.")] = None,
        scope: Annotated[str, typer.Option(help="Weights to move: trainable or all.")] = "trainable",
        compute: Annotated[str, typer.Option(help="float32, or bfloat16 (the weights stay float32).")] = "float32",
        memory: Annotated[str, typer.Option(help="Directions: auto, stored or regenerated.")] = "auto",
        cap: Annotated[float | None, typer.Option(help="Highest loss with a colour of its own.")] = None,
        picture: Annotated[str, typer.Option(help="Comma-separated: svg, html, png, pdf.")] = "svg,html",
        out: Annotated[Path | None, typer.Option(help="Folder for surfaces, pictures and finished points.")] = None,
    ) -> None:
        """See the loss surface around a model and measure its flatness (SC, AG, MAG), seed by seed."""
        from holdfast.landscape.request import Request

        asked = Request(
            model=model, data=data, grid=grid, range=range_, directions=directions, checkpoints=tuple(checkpoint or ()),
            seeds=seeds, seed=seed, line=line, rho=rho, hessian=hessian, examples=examples, max_length=max_length,
            prompt=prompt, completion=completion, scope=scope, compute=compute, memory=memory, cap=cap,
            pictures=tuple(name.strip() for name in picture.split(",") if name.strip()),
            out=out if out is not None else Path("runs") / "landscape",
        )  # fmt: skip
        with _ranks() as first:
            result = _measure(asked, first)
            if first:
                _show(asked, result)


def _measure(asked: Request, show: bool) -> Result:
    from rich.progress import Progress

    from holdfast.landscape.request import measure

    if not show:
        return measure(asked, None)
    with Progress(transient=True) as progress:
        bar = progress.add_task("points", total=None)
        return measure(asked, lambda done, total: progress.update(bar, completed=done, total=total))


@contextmanager
def _ranks() -> Iterator[bool]:
    """Join the job if torchrun started this process; whether this is the rank that prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _show(asked: Request, result: Result) -> None:
    """Print the numbers, what must be known about them, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("measure", "value", "95 % interval", title=f"{asked.model} on {asked.data}", title_justify="left")
    for name, value, interval in result.rows():
        table.add_row(name, value, interval)
    console.print(table)
    for note in result.notes():
        console.print(f"[yellow]note:[/yellow] {note}", highlight=False)
    for path in result.files:
        typer.echo(path)
