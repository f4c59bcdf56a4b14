"""Carries out a plan: each missing step and measurement once, in an order that can be stopped anywhere."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.evaluate.tasks import EvalTask
from holdfast.method import Method
from holdfast.recipe import Recipe
from holdfast.sources import locate
from holdfast.study.plan import Plan, Step
from holdfast.study.progress import Sink
from holdfast.study.store import Store
from holdfast.study.streams import TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Runner:
    """Everything a study's steps need to run."""

    recipe: Recipe
    plan: Plan
    tasks: dict[str, TaskData]
    questions: list[EvalTask]  # the stream's tests, then the panel
    store: Store
    sink: Sink

    def run(self) -> None:
        """Do what is missing: steps, and measurements of every checkpoint as soon as it exists."""
        from holdfast.study.training import training_arguments

        measured = set(self.plan.checkpoints())
        steps = self.plan.steps()
        missing = [s for s in steps if s.kind != "base" and not self.store.has_step(s)]
        unmeasured = [s for s in steps if s in measured and self._unanswered(s)]
        for step in missing:
            if step.kind == "train":
                training_arguments(step, self.store.work_folder(step))  # refuse bad settings before any work
        self.sink.plan(len(missing) + len(unmeasured))
        names = self._names()
        for step in steps:
            if step in missing:
                self._make(step, names[step])
            if step in unmeasured:
                self._measure(step, names[step])

    def _names(self) -> dict[Step, str]:
        """How a step is called on the screen: the first arm and task that need it."""
        names = {self.plan.base: "base"}
        for arm in self.plan.arms:
            for after, step in arm.checkpoints:
                for needed in (*step.inputs, step):
                    names.setdefault(needed, f"{arm.arm}, seed {arm.seed}: {after}")
        return names

    # ------------------------------------------------------------ steps

    def model_source(self, step: Step) -> str | Path:
        """What ``load_model`` takes for a step's result."""
        return self.recipe.model if step.kind == "base" else self.store.step_folder(step) / "model"

    def _make(self, step: Step, name: str) -> None:
        self.sink.begin(name, 0)
        began = time.perf_counter()
        if step.kind == "train":
            self._train(step, began)
        elif step.kind == "edit":
            self._edit(step, began)
        else:
            self._merge(step, began)
        self.sink.end()

    def _train(self, step: Step, began: float) -> None:
        from transformers import set_seed

        from holdfast.models import save_model
        from holdfast.study.training import train

        assert step.start is not None
        set_seed(step.seed)  # adapters are initialised when the model is loaded
        model, tokenizer = self._load(step.start, adapter=step.adapter)
        start, base = self._anchors(step)
        work = self.store.work_folder(step)
        trained = train(step, model, tokenizer, self.tasks, anchor=start, base=base, work=work, sink=self.sink)
        record: dict[str, Any] = {"steps": trained.steps, "history": trained.history}
        with self.store.new_step(step, record) as folder:
            save_model(_whole_model(trained.model), tokenizer, folder)
            record["seconds"] = round(time.perf_counter() - began, 2)

    def _anchors(self, step: Step) -> tuple[Path | None, Path | None]:
        """Folders of θ₀ for a training's methods: the task's start, the stream's start. None: the model as it is."""
        if step.adapter or not step.methods or step.start is None:
            return None, None  # with adapters the anchor is their own start
        if step.start.kind == "base":
            local = locate(self.recipe.model)
            folder = Path(local.at) if local.kind == "folder" else None
            return folder, folder
        wanted = step.base is not None and any(_uses_base(method) for method in step.methods)
        return self._folder(step.start), self._folder(step.base) if wanted and step.base else None

    def _edit(self, step: Step, began: float) -> None:
        from holdfast.study.editing import edit_checkpoint

        assert step.start is not None
        record: dict[str, Any] = {}
        with self.store.new_step(step, record) as folder:
            edit_checkpoint(
                step.methods, tuned=self._folder(step.inputs[0]), anchor=self._folder(step.start), out=folder
            )
            record["seconds"] = round(time.perf_counter() - began, 2)

    def _merge(self, step: Step, began: float) -> None:
        from holdfast.study.merging import merge_step

        record: dict[str, Any] = {}
        with self.store.new_step(step, record) as folder:
            merge_step(step, self._folder, self.tasks, self.store.root, folder)
            record["seconds"] = round(time.perf_counter() - began, 2)

    def _folder(self, step: Step) -> Path:
        """A step's weights as a folder of safetensors; the base is saved once if it isn't one."""
        if step.kind != "base":
            return self.store.step_folder(step) / "model"
        from holdfast.study.editing import base_folder

        return base_folder(self.recipe, self.store)

    def _load(
        self, step: Step, adapter: dict[str, Any] | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from holdfast.models import load_model

        return load_model(self.model_source(step), dtype=self.recipe.dtype, lora=adapter)

    # ------------------------------------------------------------ measurements

    def _unanswered(self, step: Step) -> list[EvalTask]:
        return [task for task in self.questions if not self.store.measure_path(step, task).exists()]

    def _measure(self, step: Step, name: str) -> None:
        from holdfast.evaluate import measure
        from holdfast.probe import on_device

        todo = self._unanswered(step)
        self.sink.begin(f"measuring {name}", sum(len(task.items) for task in todo))
        model, tokenizer = self._load(step)
        items = measure(
            on_device(model), tokenizer, todo, batch_tokens=self.recipe.batch_tokens, on_item=self.sink.advance
        )
        for task in todo:
            self.store.write_measure(step, task, items[items["task"] == task.name])
        self.sink.end()


def _uses_base(method: Method) -> bool:
    """Whether a method reads the stream's first model: a hub model is then saved once, beside the run."""
    return getattr(method, "anchor", "") == "base" or method.name == "pseudo_rehearsal"


def _whole_model(model: Any) -> PreTrainedModel:
    """Adapters are merged into their model: the next task, and every average, works on effective weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def disk_free(path: Path) -> int:
    """Bytes free where ``path`` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
