"""``holdfast fisher``: the Fisher information of a model, as a file that ``holdfast merge fisher`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def fisher(
        model: Annotated[str, typer.Argument(help="A model: folder, .gguf file, hub id, or lab.")],
        data: Annotated[str, typer.Option(help="Examples the model should stay good at: a file, or lab:TASK.")],
        out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
        kind: Annotated[str, typer.Option(help="empirical, true or batch.")] = "empirical",
        samples: Annotated[int, typer.Option(min=1, help="Examples drawn from the data.")] = 256,
        batch: Annotated[int, typer.Option(min=1, help="Examples per gradient for kind batch.")] = 8,
        prompt: Annotated[str | None, typer.Option(help="Template over the columns, as 'Q: {question}'.")] = None,
        completion: Annotated[str | None, typer.Option(help="Template of the answer, with its leading space.")] = None,
        max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 1024,
        seed: Annotated[int, typer.Option(help="Which examples, and sampled labels.")] = 0,
    ) -> None:
        """Estimate diagonal Fisher information of a model on data and write it to a file."""
        from holdfast.errors import UserError
        from holdfast.merge.fisher_file import KINDS, compute_fisher, save_fisher

        if kind not in KINDS:
            raise UserError(f"--kind '{kind}' is unknown; valid: {', '.join(KINDS)}.")
        examples = read(data, prompt, completion)
        from holdfast.models import load_model
        from holdfast.probe import on_device

        loaded, tokenizer = load_model(model)
        loaded = on_device(loaded)
        values = compute_fisher(
            loaded, tokenizer, examples, kind=kind, samples=samples, batch=batch, max_length=max_length, seed=seed,  # type: ignore[arg-type]
        )  # fmt: skip
        about = {"model": model, "data": data, "kind": kind, "samples": min(samples, len(examples)), "seed": seed}
        save_fisher(out, values, about)
        total = sum(float(value.sum()) for value in values.values())
        typer.echo(f"{out}: {kind} Fisher of {model} on {about['samples']} examples, trace {total:.4g}")


def read(data: str, prompt: str | None, completion: str | None):  # type: ignore[no-untyped-def]
    """The examples of a file, or the training set of one of the lab's tasks."""
    if data.startswith("lab:"):
        from holdfast import lab

        return lab.load_task(data.removeprefix("lab:"), "train")
    from holdfast.data import read_examples

    return read_examples(data, prompt=prompt, completion=completion)
