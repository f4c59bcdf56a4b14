"""What `holdfast eval` and `holdfast check` do, without their printing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from holdfast.errors import UserError
from holdfast.evaluate.panels import Built, build
from holdfast.evaluate.sandbox import Sandbox
from holdfast.evaluate.store import cached_measure, is_results, load_about, load_results
from holdfast.files import digest

Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where scores are kept: HOLDFAST_SCORES, or the user's cache folder."""
    if chosen := os.environ.get("HOLDFAST_SCORES"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast" / "scores"


@dataclass(frozen=True)
class Request:
    """Which questions to ask and how; the same for every model that is compared."""

    panel: str | None = None
    local_data: Path | None = None
    limit: int | None = None
    dtype: str = "float32"
    batch_tokens: int | None = None
    run_code: bool = False
    cache: Path | None = None

    def built(self, say: Say) -> Built:
        """The panel's tasks. Programs are left out unless allowed; what has no data is said."""
        if self.panel is None:
            raise UserError("--panel is needed to measure a model: paper1, sfa, quick or lab.")
        built = build(self.panel, local_data=self.local_data, limit=self.limit)
        programs = [task.name for task in built.tasks if task.metric == "pass@1"]
        if programs and not self.run_code:
            say(f"left out {', '.join(programs)}: it runs generated programs; --run-code allows that, in a sandbox")
            built = Built(
                built.panel, built.version, tuple(t for t in built.tasks if t.name not in programs), built.missing
            )
        if built.missing:
            say(f"panel '{built.panel}' is incomplete, no data for: {', '.join(built.missing)}")
        if not built.tasks:
            raise UserError(f"panel '{self.panel}': nothing is left to measure.")
        return built


def evaluate(source: str, request: Request, say: Say) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Load a model, score the panel (what the cache has is read back), and say what was measured with what."""
    from holdfast.models import load_model, source_hash
    from holdfast.probe import on_device

    built = request.built(say)
    weights = source_hash(source)
    say(f"loading {source}")
    model, tokenizer = load_model(source, dtype=request.dtype)
    model = on_device(model)
    say(f"scoring {sum(len(task.items) for task in built.tasks):,} items of {len(built.tasks)} tasks")
    items = cached_measure(
        model,
        tokenizer,
        built.tasks,
        request.cache or cache_folder(),
        weights=weights,
        batch_tokens=request.batch_tokens,
        sandbox=Sandbox() if request.run_code else None,
    )
    about = {
        "model": source,
        "weights": weights,
        "panel": built.panel,
        "version": built.version,
        "limit": request.limit,
        "local_data": None if request.local_data is None else str(request.local_data),
        "dtype": request.dtype,
        "missing": list(built.missing),
        "questions": digest({task.name: task.hash() for task in built.tasks}),
    }
    return items, about


def both_sides(before: str, after: str, request: Request, say: Say) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Per-item tables of two models or results; a model is asked the panel that the other side's results name."""
    known = {source: load_about(Path(source)) for source in (before, after) if is_results(Path(source))}
    for source, about in known.items():
        if request.panel is not None and about.get("panel") not in (None, request.panel):
            raise UserError(f"{source} holds results of panel '{about['panel']}', not '{request.panel}'.")
    if request.panel is None and len(known) == 1:
        (about,) = known.values()
        if not about.get("panel"):
            raise UserError("these results don't say which panel they are of: pass --panel.")
        folder = request.local_data or (Path(about["local_data"]) if about.get("local_data") else None)
        request = Request(
            **{
                **request.__dict__,
                "panel": about["panel"],
                "local_data": folder,
                "limit": request.limit if request.limit is not None else about.get("limit"),
                "dtype": about.get("dtype", request.dtype),
            }
        )
    tables = [
        load_results(Path(source)) if source in known else evaluate(source, request, say)[0]
        for source in (before, after)
    ]
    return tables[0], tables[1]
