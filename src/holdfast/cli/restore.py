"""``holdfast restore``: bring a tuned model's format back with plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def restore(
        model: Annotated[str, typer.Argument(help="The tuned model.")],
        base: Annotated[str, typer.Option(help="The model before tuning: it ranks the text.")],
        corpus: Annotated[
            str, typer.Option(help="Plain text like the pretraining text: files, a folder, lab, or a hub id.")
        ],
        out: Annotated[Path, typer.Option(help="Folder of the restored model.")],
        tuned_on: Annotated[str | None, typer.Option(help="The tuning data: its size is the text budget.")] = None,
        tokens: Annotated[int | None, typer.Option(help="Tokens to restore with (default: one epoch).")] = None,
        methods: Annotated[
            list[str] | None, typer.Option("--method", help="Restore with a method: 'sfa p=0.25'. Repeatable.")
        ] = None,
        lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-5,
        batch_size: Annotated[int, typer.Option(help="Blocks of text per step.")] = 16,
        max_length: Annotated[int, typer.Option(help="Tokens of a block.")] = 512,
        seed: Annotated[int, typer.Option(help="Order of the text.")] = 0,
        column: Annotated[str, typer.Option(help="Column that holds the text, where the corpus is a table.")] = "text",
        passage_words: Annotated[int, typer.Option(help="Words of a passage.")] = 200,
        passages: Annotated[int | None, typer.Option(help="Rank only so many, from the start of the corpus.")] = None,
    ) -> None:
        """Restore one model: rank the corpus by the base's perplexity, train on the lowest, save."""
        from holdfast.diagnose.restored_model import restore_model
        from holdfast.study.quiet import quiet_libraries

        quiet_libraries()
        found = restore_model(
            model,
            base,
            corpus,
            out,
            tuning=tuning_data(tuned_on),
            tokens=tokens,
            column=column,
            passage_words=passage_words,
            passages=passages,
            say=lambda message: typer.echo(f"{message} …", err=True),
            **restoring(lr, batch_size, max_length, seed, methods),
        )
        before, after = found["trajectory"][0][1], found["trajectory"][-1][1]
        typer.echo(
            f"probe perplexity {before:.2f} → {after:.2f} (base {found['base_perplexity']:.2f}) after {found['steps']} "
            f"steps on {found['text']['restoring']['tokens']:,} tokens\nModel: {out}    Account: {out / 'restore.json'}"
        )


def tuning_data(source: str | None) -> Any:
    """The tuning data as examples; ``lab:math`` and the like name a task of the lab."""
    if source is None:
        return None
    if source.startswith("lab:"):
        from holdfast.lab.tasks import load_task

        return load_task(source.removeprefix("lab:"), "train")
    from holdfast.data import read_examples

    return read_examples(source)


def restoring(lr: float, batch_size: int, max_length: int, seed: int, methods: list[str] | None) -> dict[str, Any]:
    """Keyword arguments ``restoring`` and ``methods`` from the command's options."""
    from holdfast.diagnose.restoring import RestoreSettings

    settings = RestoreSettings(learning_rate=lr, batch_size=batch_size, max_length=max_length, seed=seed)
    return {"restoring": settings, "methods": tuple(parse_method(text) for text in methods or [])}


def parse_method(text: str) -> Any:
    """``sfa p=0.25 beta=0.5`` -> the method."""
    import yaml

    from holdfast.errors import UserError
    from holdfast.method import from_spec

    name, *settings = text.split()
    if bad := [setting for setting in settings if "=" not in setting]:
        raise UserError(f"--method {text!r}: settings are written key=value, not '{bad[0]}'")
    pairs = (setting.split("=", 1) for setting in settings)
    return from_spec(name, {key: yaml.safe_load(value) for key, value in pairs})
