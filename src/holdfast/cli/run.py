"""``holdfast run``: fine-tune through a stream of tasks, arm by arm, and measure what is forgotten."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="A recipe (built-in name or YAML file; default quickstart), then key=value overrides.", show_default=False
    ),
]


def split_arguments(words: list[str] | None) -> tuple[str, list[str]]:
    """``[recipe] [key=value …]`` -> the recipe (default quickstart) and the overrides."""
    from holdfast.errors import UserError

    words = list(words or [])
    recipe = words.pop(0) if words and "=" not in words[0] else "quickstart"
    for word in words:
        if "=" not in word:
            raise UserError(f"'{word}': after the recipe come overrides, written key=value.")
    return recipe, words


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def run(
        recipe: RecipeArgument = None,
        out: Annotated[
            Path | None, typer.Option(help="Run directory; an existing one is continued or extended.")
        ] = None,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table.")] = False,
    ) -> None:
        """Run a study: train every arm through the tasks, measure every checkpoint, write table and report."""
        from holdfast.recipe import load_recipe

        name, overrides = split_arguments(recipe)
        checked = load_recipe(name, overrides)
        folder = out if out is not None else Path("runs") / checked.name
        try:
            _run(checked, folder, quiet)
        except KeyboardInterrupt:
            again = " ".join(["holdfast run", name, *overrides, "--out", str(folder)])
            print(
                f"\nholdfast: interrupted; finished steps are saved in {folder}. Continue with:\n  {again}",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None


def _run(checked: object, folder: Path, quiet: bool) -> None:
    from contextlib import nullcontext

    from holdfast.cli.tables import print_study
    from holdfast.recipe import Recipe
    from holdfast.report import write_report
    from holdfast.study import Study
    from holdfast.study.progress import Silent, bars
    from holdfast.study.quiet import keep_freed_memory, quiet_libraries

    assert isinstance(checked, Recipe)
    quiet_libraries()
    keep_freed_memory()
    with nullcontext(Silent()) if quiet else bars() as sink:
        study = Study.run(checked, out=folder, sink=sink)
    report = write_report(study.data, folder / "report.html")
    if not quiet:
        print_study(study)
        typer.echo(f"\nReport: {report}    Results: {folder / 'study.json'}    Per item: {folder / 'items.parquet'}")
