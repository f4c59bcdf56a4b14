"""``holdfast report``: the table and the HTML report of a finished study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def report(
        folder: Annotated[Path, typer.Argument(help="Run directory of a study.")],
        html: Annotated[
            Path | None, typer.Option(help="Where to write the report; default FOLDER/report.html.")
        ] = None,
    ) -> None:
        """Print a study's table and write its report again, from its results alone."""
        from holdfast.cli.tables import print_study
        from holdfast.report import write_report
        from holdfast.study import Study

        study = Study.load(folder)
        print_study(study)
        typer.echo(f"Report: {write_report(study.data, html or folder / 'report.html')}")
