"""``holdfast list``: what there is to use."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(name="list")
    def list_() -> None:
        """List recipes and methods with their settings."""
        from rich.console import Console
        from rich.table import Table

        from holdfast.methods import METHODS
        from holdfast.recipe_file import builtin_recipes

        console = Console()
        recipes = Table("recipe", "what it is", title="Recipes (holdfast run NAME)", title_justify="left")
        for name, path in builtin_recipes().items():
            first = path.read_text(encoding="utf-8").splitlines()[0]
            recipes.add_row(name, first.lstrip("# ").strip())
        console.print(recipes)
        methods = Table(
            "method", "settings", "what it does", title="Methods (arms: {mine: [{NAME: {…}}]})", title_justify="left"
        )
        for name, method in METHODS.items():
            summary = (method.__doc__ or "").strip().splitlines()[0]
            methods.add_row(name, settings(method), summary)
        console.print(methods)


def settings(method: type) -> str:
    """``rho=0.05, adaptive=False`` of a method's dataclass fields."""
    import dataclasses

    parts = []
    for field in dataclasses.fields(method):
        if not field.init or field.name.startswith("_"):
            continue
        has_default = field.default is not dataclasses.MISSING
        parts.append(f"{field.name}={field.default!r}" if has_default else field.name)
    return ", ".join(parts)
