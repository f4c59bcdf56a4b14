"""Studies: arms × seeds × tasks, measured at every checkpoint, resumable, every computation done once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from holdfast.errors import UserError
from holdfast.files import digest, write_json
from holdfast.recipe import Recipe, load_recipe
from holdfast.results import Results

if TYPE_CHECKING:
    from holdfast.evaluate.tasks import EvalTask
    from holdfast.study.plan import Plan, Step
    from holdfast.study.progress import Sink
    from holdfast.study.run import Runner
    from holdfast.study.streams import TaskData

__all__ = ["Prepared", "Results", "Study", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A recipe with its data read and its steps planned; nothing has been computed yet."""

    recipe: Recipe
    tasks: list[TaskData]
    panel: list[EvalTask]
    plan: Plan

    @property
    def questions(self) -> list[EvalTask]:
        """Everything a checkpoint is measured on: the stream's tests, then the panel."""
        return [*(task.test for task in self.tasks), *self.panel]


def prepare(recipe: Recipe) -> Prepared:
    """Read the model's tokenizer and all data, check them, and plan the steps. Raises UserError for bad input."""
    from holdfast.models import load_tokenizer, source_hash
    from holdfast.study.plan import plan_study
    from holdfast.study.streams import load_panel, load_tasks

    tokenizer = load_tokenizer(recipe.model)
    tasks = load_tasks(recipe, tokenizer)
    panel = load_panel(recipe, tokenizer)
    return Prepared(recipe, tasks, panel, plan_study(recipe, tasks, source_hash(recipe.model)))


class Study(Results):
    """A finished study and its run directory; ``Study.run`` makes one, ``Study.load`` reads one.

    ``table()`` has one row per arm; ``matrix(arm, seed)`` is R[i, j], the score on task j after task i.
    """

    folder: Path

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        super().__init__(data)
        object.__setattr__(self, "folder", folder)

    @classmethod
    def run(
        cls,
        recipe: str | Path | Mapping[str, Any] | Recipe,
        out: str | Path | None = None,
        overrides: Iterable[str] = (),
        sink: Sink | None = None,
    ) -> Study:
        """Run a recipe, or what is still missing of it, in the directory ``out`` (default ``runs/<name>``).

        Same as ``holdfast run RECIPE --out OUT``. Interrupt it at any time: the next call continues. Raises UserError
        for bad input, before any training where possible.
        """
        from holdfast.study.environment import environment
        from holdfast.study.progress import Silent
        from holdfast.study.run import Runner
        from holdfast.study.store import Store

        checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        store = Store(Path(out) if out is not None else Path("runs") / checked.name)
        prepared = prepare(checked)
        with store.locked():
            store.claim(checked)
            store.sweep()
            write_json(store.root / "environment.json", environment())
            tasks = {task.name: task for task in prepared.tasks}
            runner = Runner(checked, prepared.plan, tasks, prepared.questions, store, sink or Silent())
            runner.run()
            data = collect(prepared, runner)
            write_json(store.root / "study.json", data)
            store.write_parquet(store.root / "items.parquet", item_table(prepared, runner))
        return cls(store.root, data)

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Read a finished study from its run directory. Raises UserError where there is none."""
        path = Path(folder) / "study.json"
        if not path.exists():
            raise UserError(f"{folder}: no finished study there (study.json is missing); run `holdfast run` first.")
        return cls(Path(folder), json.loads(path.read_text(encoding="utf-8")))

    def items(self) -> pd.DataFrame:
        """Per-item outcomes of every checkpoint: arm, seed, after, task, item, score, weight, …"""
        return pd.read_parquet(self.folder / "items.parquet")


# ---------------------------------------------------------------- study.json


def collect(prepared: Prepared, runner: Runner) -> dict[str, Any]:
    """All results of a complete run as plain data: what ``study.json`` holds and the report reads."""
    recipe, plan, store = prepared.recipe, prepared.plan, runner.store
    steps = {step.key: step_record(step, runner) for step in plan.steps() if step.kind != "base"}
    arms: dict[str, dict[str, Any]] = {}
    for arm in plan.arms:
        spec = recipe.arms[arm.arm]
        about = {key: spec.model_dump(mode="json")[key] for key in ("train", "methods", "peft", "merge")}
        entry = arms.setdefault(arm.arm, about)
        checkpoints = [
            {"after": after, "step": step.key, "scores": scores(prepared.questions, step, runner)}
            for after, step in arm.checkpoints
        ]
        needed = [step.key for step in arm.steps() if step.kind != "base"]
        entry[str(arm.seed)] = {
            "checkpoints": checkpoints,
            "seconds": round(sum(steps[key]["seconds"] for key in needed), 2),
            "trainings": [key for key in needed if steps[key]["kind"] == "train"],
            "drops": drops(prepared, arm.checkpoints, runner) if spec.train == "sequential" else {},
        }
    return {
        "format": 1,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": digest(recipe.model_dump(mode="json")),
        "environment": json.loads((store.root / "environment.json").read_text()),
        "seeds": recipe.seeds,
        "tasks": [describe_task(task.test) for task in prepared.tasks],
        "panel": [describe_task(task) for task in prepared.panel],
        "data": {
            task.name: {"rows": len(task.train), "hash": task.train_hash, "notes": list(task.notes)}
            for task in prepared.tasks
        },
        "base": scores(prepared.questions, plan.base, runner),
        "arms": arms,
        "steps": steps,
    }


def describe_task(task: EvalTask) -> dict[str, Any]:
    """A measured task in study.json."""
    return {
        "name": task.name,
        "metric": task.metric,
        "items": len(task.items),
        "chance": task.chance,
        "hash": task.hash(),
    }


def step_record(step: Step, runner: Runner) -> dict[str, Any]:
    """A finished step in study.json: what it was, how long it took, and its training log."""
    record = runner.store.read_step(step)
    kept: dict[str, Any] = {key: record[key] for key in ("seconds", "steps", "history") if key in record}
    return {"kind": step.kind, "tasks": list(step.tasks), "seed": step.seed, "content": step.content, **kept}


def scores(questions: list[EvalTask], step: Step, runner: Runner) -> dict[str, Any]:
    """Every task's score at a checkpoint, with its 95 % interval."""
    from holdfast.evaluate import summarize

    items = pd.concat([runner.store.read_measure(step, task) for task in questions], ignore_index=True)
    rows: dict[str, dict[str, Any]] = summarize(items).set_index("task").to_dict("index")  # type: ignore[assignment]
    return {
        task.name: {key: float(rows[task.name][key]) for key in ("value", "low", "high")}
        | {"n": int(rows[task.name]["n"]), "metric": task.metric}
        for task in questions
    }


def drops(prepared: Prepared, checkpoints: Iterable[tuple[str, Step]], runner: Runner) -> dict[str, Any]:
    """Paired drops at the end with 95 % intervals: each earlier task since it was taught, the panel since the base."""
    from holdfast.evaluate.statistics import paired_bootstrap

    made = dict(checkpoints)
    last = list(made.values())[-1]
    found: dict[str, Any] = {}
    before = {task.test.name: made[task.name] for task in prepared.tasks[:-1]}
    before |= {task.name: prepared.plan.base for task in prepared.panel}
    for task in prepared.questions:
        if task.name not in before or task.kind == "perplexity":
            continue
        pair = [runner.store.read_measure(step, task)["score"].to_numpy() for step in (before[task.name], last)]
        interval = paired_bootstrap(pair[0], pair[1])
        found[task.name] = {key: 100 * float(getattr(interval, key)) for key in ("value", "low", "high")}
    return found


def item_table(prepared: Prepared, runner: Runner) -> pd.DataFrame:
    """Per-item outcomes of the whole study in one frame; shared checkpoints appear under each arm that has them."""
    frames = []
    for arm in prepared.plan.arms:
        rows = [("base", prepared.plan.base), *arm.checkpoints]
        for after, step in rows:
            for task in prepared.questions:
                frame = runner.store.read_measure(step, task)
                frames.append(frame.assign(arm=arm.arm, seed=arm.seed, after=after))
    items = pd.concat(frames, ignore_index=True)
    first = ["arm", "seed", "after"]
    return items[first + [column for column in items.columns if column not in first]]
