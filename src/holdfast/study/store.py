"""A run directory: finished steps and measurements, each whole or absent, found again by their key.

::

    runs/x/
      recipe.yaml  environment.json  study.json  items.parquet  report.html
      steps/train-<key>/      model/ (an ordinary checkpoint), step.json (inputs, seconds, training log)
      measures/<key>.parquet  per-item outcomes of one checkpoint on one task
      work/                   Trainer checkpoints of unfinished trainings
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from holdfast.errors import UserError
from holdfast.files import digest, new_folder, write_json, write_text
from holdfast.recipe import Recipe
from holdfast.study.plan import Step

if TYPE_CHECKING:
    from pandas import DataFrame

    from holdfast.evaluate.tasks import EvalTask


class Store:
    """Reads and writes one run directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # ------------------------------------------------------------ the directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; a second run on it is an error, not a race."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.root}: another holdfast process is running in this directory.") from None
            yield

    def claim(self, recipe: Recipe) -> None:
        """Make the directory this recipe's, or check that it is.

        Raises UserError where it holds another recipe's results, or files that holdfast did not write.
        """
        path = self.root / "recipe.yaml"
        if path.exists():
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
            known = Recipe.model_validate(before).identity()
            changed = first_difference(known, recipe.identity())
            if changed:
                raise UserError(
                    f"{self.root} holds the results of a different recipe: {changed}. Choose another --out."
                )
        elif self.root.exists() and any(entry.name != ".lock" for entry in self.root.iterdir()):
            raise UserError(f"{self.root} is not empty and holds no holdfast study; choose another --out.")
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(path, text)

    # ------------------------------------------------------------ steps

    def step_folder(self, step: Step) -> Path:
        return self.root / "steps" / step.folder

    def work_folder(self, step: Step) -> Path:
        return self.root / "work" / step.folder

    def has_step(self, step: Step) -> bool:
        return (self.step_folder(step) / "step.json").exists()

    def read_step(self, step: Step) -> dict[str, Any]:
        return json.loads((self.step_folder(step) / "step.json").read_text(encoding="utf-8"))

    @contextmanager
    def new_step(self, step: Step, record: dict[str, Any]) -> Iterator[Path]:
        """Yield the folder to save the model in; step.json is written after it and then both appear at once."""
        with new_folder(self.step_folder(step)) as folder:
            yield folder / "model"
            write_json(folder / "step.json", {"key": step.key, "kind": step.kind, "content": step.content, **record})
        shutil.rmtree(self.work_folder(step), ignore_errors=True)

    # ------------------------------------------------------------ measurements

    def measure_path(self, step: Step, task: EvalTask) -> Path:
        return self.root / "measures" / f"{digest({'step': step.key, 'task': task.hash()})}.parquet"

    def read_measure(self, step: Step, task: EvalTask) -> DataFrame:
        import pandas as pd

        return pd.read_parquet(self.measure_path(step, task))

    def write_measure(self, step: Step, task: EvalTask, items: DataFrame) -> None:
        self.write_parquet(self.measure_path(step, task), items)

    def write_parquet(self, path: Path, frame: DataFrame) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            frame.to_parquet(temporary, index=False)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what interrupted writes left behind."""
        for folder in (self.root, self.root / "steps", self.root / "measures"):
            for leftover in folder.glob(".*.tmp"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """``tasks.0.train_limit was 100, is 200``, or "" where both are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            found = first_difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now)):
            found = first_difference(old, new, f"{where}.{i}")
            if found:
                return found
        return ""
    if before == now:
        return ""
    return f"'{where}' was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
