"""``holdfast lab``: the embedded world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the ``lab`` command group."""
    lab = typer.Typer(help="The embedded world: a small pretrained model with its benchmark and tasks.")
    app.add_typer(lab, name="lab", no_args_is_help=True)

    @lab.callback()
    def group() -> None:
        """Keep ``build`` a subcommand although it is the only one."""

    @lab.command()
    def build(
        out: Annotated[Path, typer.Option(help="Folder for the model and its tokenizer.")] = Path("models/lab"),
    ) -> None:
        """Train the lab's tokenizer and pretrain its model again: the same bytes every time, about 5 minutes."""
        from rich import print as show

        from holdfast.errors import UserError
        from holdfast.lab.build import build as build_model

        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} exists and is not an empty folder; name a new one.")
        show(f"wrote {build_model(out)}")
