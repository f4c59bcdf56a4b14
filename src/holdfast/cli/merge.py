"""``holdfast merge``: merge checkpoints at disk speed in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer

from holdfast.errors import UserError

HELP = """Merge checkpoints: holdfast merge METHOD MODEL… --base B --out DIR [key=value].

Methods: linear, wise_ft, slerp, task_arithmetic, negation, ties, dare, magnitude_prune, fisher.

Settings are key=value: density=0.2, scope=model, alpha=0.5, t=0.5, seed=1, fisher=A.safetensors,B.safetensors.

A sweep writes one folder per value from one pass over the inputs: --sweep alpha=0:1:0.1 or --sweep density=0.1,0.2.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(help=HELP)
    def merge(
        method: str = typer.Argument(help="How to merge."),
        models: list[str] = typer.Argument(help="Checkpoint folders or files, and key=value settings."),
        out: Optional[Path] = typer.Option(None, help="Folder to write."),  # noqa: UP045 (Typer reads it at run time)
        base: Optional[Path] = typer.Option(None, help="The model that the others were tuned from."),  # noqa: UP045
        weight: list[str] = typer.Option([], help="One weight per model: repeat, or separate with commas."),
        sweep: list[str] = typer.Option([], help="KEY=a,b,c or KEY=start:stop:step; several are combined."),
        panel: Optional[str] = typer.Option(None, help="Evaluate every output on this panel (lab, or tasks)."),  # noqa: UP045
        axes: Optional[str] = typer.Option(None, help="Two tasks of the panel for the Pareto plane: X,Y."),  # noqa: UP045
        limit: Optional[int] = typer.Option(None, min=1, help="Items per task of the panel."),  # noqa: UP045
        dtype: Optional[str] = typer.Option(None, help="Type of the output; the input's by default."),  # noqa: UP045
        embeddings: str = typer.Option("error", help="Where vocabularies differ: error, base or overlap."),
        allow_missing: bool = typer.Option(False, help="Keep the base's tensors where a model lacks them."),
        allow_nonfinite: bool = typer.Option(False, help="Merge NaN and inf as they are."),
        overwrite: bool = typer.Option(False, help="Replace an existing output folder."),
        dry_run: bool = typer.Option(False, help="Print plan, memory and disk need; write nothing."),
        threads: Optional[int] = typer.Option(None, min=1, help="Workers; one more than the cores by default."),  # noqa: UP045
    ) -> None:
        from holdfast.merge.checkpoints import merge_checkpoints

        paths, settings = split_settings(models)
        swept = dict(parse_sweep(text) for text in sweep)
        if panel and not swept:
            raise UserError("--panel goes with --sweep; for one model use `holdfast eval`.")
        result = merge_checkpoints(
            method,
            paths,
            out,
            base,
            parse_weights(weight),
            sweep=swept or None,
            dtype=dtype,
            allow_missing=allow_missing,
            embeddings=embeddings,  # type: ignore[arg-type]
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            dry_run=dry_run,
            threads=threads,
            progress=None if dry_run else Meter(),
            **settings,
        )
        if dry_run:
            typer.echo("\n".join(result.plan.describe()))
            return
        for name, count in result.nonfinite.items():
            typer.echo(f"warning: {name} holds {count} NaN or inf")
        for line in result.plan.notes():
            typer.echo(line)
        size = result.plan.output_bytes / 1e9
        how = "was merged already" if result.already_done else f"{size:.2f} GB in {result.seconds:.1f} s"
        typer.echo(f"{result.out}: {how}{' (continued an interrupted merge)' if result.resumed else ''}")
        if panel:
            from holdfast.merge.pareto import evaluate_sweep

            pair = tuple(axes.split(",")) if axes else None
            if pair is not None and len(pair) != 2:
                raise UserError(f"--axes takes two tasks, X,Y, not '{axes}'.")
            typer.echo(evaluate_sweep(result, panel, pair, limit).round(2).to_string())
            typer.echo(f"Pareto plane: {result.out / 'pareto.html'}")


class Meter:
    """Progress on a terminal: share done, speed and time left, at most every fifth of a second."""

    def __init__(self) -> None:
        import sys
        import time

        self._clock, self._stream = time.monotonic, sys.stderr
        self._start = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        self._first = done if self._first is None else self._first
        if not self._stream.isatty() or (now - self._last < 0.2 and done < total):
            return
        self._last = now
        speed = max(1.0, (done - self._first) / max(1e-3, now - self._start))
        end = "\n" if done >= total else ""
        share, left = done / max(1, total), (total - done) / speed
        line = f"\r{share:4.0%} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left "
        self._stream.write(line + end)
        self._stream.flush()


def split_settings(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Paths and key=value settings from the positional words; an existing path wins over a setting."""
    paths, settings = [], {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier() or Path(word).exists():
            paths.append(word)
        elif key == "fisher":
            settings[key] = tuple(text.split(","))
        else:
            settings[key] = parse_value(text)
    return paths, settings


def parse_value(text: str) -> Any:
    """int, float, true/false, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_weights(words: list[str]) -> list[float] | None:
    """``--weight 0.3,0.7`` or ``--weight 0.3 --weight 0.7``; None if not given."""
    if not words:
        return None
    try:
        return [float(part) for word in words for part in word.split(",")]
    except ValueError:
        raise UserError(f"--weight takes numbers, one per model, not '{' '.join(words)}'.") from None


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """``alpha=0:1:0.25`` (stop included), ``density=0.1,0.2``, ``weights=1,0;0.5,0.5`` -> key and values."""
    key, equals, values = text.partition("=")
    try:
        if not equals or not values:
            raise ValueError
        if ":" in values:
            start, stop, step = (float(part) for part in values.split(":"))
            count = round((stop - start) / step)
            if count < 0 or count > 10_000:
                raise ValueError
            return key, [round(start + i * step, 12) for i in range(count + 1)]
        if ";" in values or key == "weights":
            return key, [[float(part) for part in group.split(",")] for group in values.split(";")]
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--sweep {text}: expected KEY=start:stop:step or KEY=a,b,c (weights=1,0;0.5,0.5).") from None
    return key, [parse_value(part) for part in values.split(",")]
