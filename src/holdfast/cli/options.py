"""Options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LocalData = Annotated[Path | None, typer.Option(help="Folder with the tasks' files; no hub is used.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items per task, the same ones every time.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16, float16, auto.")]
BatchTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of one forward.")]
RunCode = Annotated[bool, typer.Option("--run-code", help="Run generated programs, in a sandbox.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of cached scores.")]
