"""What a study computes, before it computes anything: content-addressed steps that arms share.

Every step's key is a hash of what decides its result: the key of the weights it starts from, its data, the methods
that act, the training settings and the seed. Two arms that agree so far have the same steps and pay for them once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from holdfast.errors import UserError
from holdfast.files import digest
from holdfast.method import Method, from_spec, seams
from holdfast.recipe import ArmSpec, MergeSpec, Recipe
from holdfast.study.merging import merge_content
from holdfast.study.streams import TaskData

RULES = 1  # part of every key: raised when the same settings would give other numbers


@dataclass(frozen=True)
class Step:
    """One computation that ends in a checkpoint.

    ``base`` is the model as given; ``train`` trains ``start`` on ``tasks``; ``edit`` maps (tuned, anchor) =
    (``inputs[0]``, ``start``) through the checkpoint seam; ``merge`` makes one model of ``inputs``, all trained from
    ``start``.
    """

    kind: Literal["base", "train", "edit", "merge"]
    content: dict[str, Any] = field(hash=False)  # everything that decides the result, JSON-like
    start: Step | None = None
    inputs: tuple[Step, ...] = ()
    base: Step | None = None
    tasks: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()  # past tasks whose data the methods may use
    methods: tuple[Method, ...] = field(default=(), hash=False)
    training: dict[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0
    adapter: dict[str, Any] | None = field(default=None, hash=False)  # PEFT settings of this training

    @cached_property
    def key(self) -> str:
        parents = [step.key for step in (self.start, self.base, *self.inputs) if step is not None]
        return digest({"rules": RULES, "kind": self.kind, "content": self.content, "parents": parents})

    @property
    def folder(self) -> str:
        return f"{self.kind}-{self.key}"

    def parents(self) -> list[Step]:
        found = [step for step in (self.start, *self.inputs) if step is not None]
        if self.base is not None and self.base not in found:
            found.append(self.base)
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class ArmPlan:
    """The checkpoints of one arm with one seed: (after which task, step)."""

    arm: str
    seed: int
    checkpoints: tuple[tuple[str, Step], ...]

    def steps(self) -> list[Step]:
        """Every step this arm's checkpoints come from, each once, in an order in which they can be run."""
        return in_order([step for _, step in self.checkpoints])


@dataclass(frozen=True)
class Plan:
    """A whole study: the base model and every arm with every seed."""

    base: Step
    arms: tuple[ArmPlan, ...]

    def steps(self) -> list[Step]:
        """All distinct steps in an order in which they can be run; the base first."""
        return in_order([self.base, *(step for arm in self.arms for _, step in arm.checkpoints)])

    def checkpoints(self) -> list[Step]:
        """The distinct checkpoints that are measured, in the order in which they are made."""
        measured = {self.base, *(step for arm in self.arms for _, step in arm.checkpoints)}
        return [step for step in self.steps() if step in measured]


def in_order(targets: list[Step]) -> list[Step]:
    """Distinct steps needed for ``targets``, parents before children."""
    ordered: dict[Step, None] = {}

    def visit(step: Step) -> None:
        if step not in ordered:
            for parent in step.parents():
                visit(parent)
            ordered[step] = None

    for target in targets:
        visit(target)
    return list(ordered)


def build_methods(entries: list[dict[str, dict[str, Any]]]) -> tuple[Method, ...]:
    """Method objects of an arm, in the recipe's order."""
    return tuple(from_spec(name, settings) for entry in entries for name, settings in entry.items())


def checkpoint_only(method: Method) -> bool:
    """Whether a method acts on the finished checkpoint alone, so that it needs no training of its own."""
    return seams(method) == {"checkpoint"}


def plan_study(recipe: Recipe, tasks: list[TaskData], weights: str) -> Plan:
    """All steps of a study. ``weights`` is the content hash of the base model's weights."""
    base = Step("base", {"weights": weights, "dtype": recipe.dtype, "lora": recipe.lora})
    planner = _Planner(recipe, tasks, base)
    plans = [
        ArmPlan(name, seed, tuple(planner.checkpoints(arm, seed)))
        for seed in recipe.seeds
        for name, arm in recipe.arms.items()
    ]
    return Plan(base, tuple(plans))


class _Planner:
    def __init__(self, recipe: Recipe, tasks: list[TaskData], base: Step) -> None:
        self.recipe, self.tasks, self.base = recipe, tasks, base

    def checkpoints(self, arm: ArmSpec, seed: int) -> list[tuple[str, Step]]:
        methods = build_methods(arm.methods)
        past = [method.name for method in methods if method.needs_past]
        if past and arm.train != "sequential":
            raise UserError(f"{past[0]}: needs past tasks' data, and `train: {arm.train}` has no past tasks.")
        if arm.train == "joint":
            return [("joint", self._step(self.base, self.tasks, [], methods, arm, seed, arm.peft))]
        if arm.train == "independent":
            return self._independent(arm, seed)
        return self._sequential(arm, seed)

    def _sequential(self, arm: ArmSpec, seed: int) -> list[tuple[str, Step]]:
        start, checkpoints = self.base, []
        for i, task in enumerate(self.tasks):
            acts = i + 1 >= arm.from_task
            methods = build_methods(arm.methods) if acts else ()
            if i == 0:  # there is nothing to remember yet
                methods = tuple(method for method in methods if not method.needs_past)
            start = self._step(start, [task], self.tasks[:i], methods, arm, seed, arm.peft if acts else None)
            checkpoints.append((task.name, start))
        return checkpoints

    def _independent(self, arm: ArmSpec, seed: int) -> list[tuple[str, Step]]:
        merge = arm.merge or MergeSpec()
        tuned, checkpoints = [], []
        for i, task in enumerate(self.tasks):
            acts = i + 1 >= arm.from_task
            methods = build_methods(arm.methods) if acts else ()
            tuned.append(self._step(self.base, [task], [], methods, arm, seed, arm.peft if acts else None))
            if i == 0:
                checkpoints.append((task.name, tuned[0]))  # one model: nothing to merge yet
                continue
            content = merge_content(merge, i + 1, len(self.tasks), seed)
            checkpoints.append((task.name, Step("merge", content, start=self.base, inputs=tuple(tuned), seed=seed)))
        return checkpoints

    def _step(
        self,
        start: Step,
        tasks: list[TaskData],
        past: list[TaskData],
        methods: tuple[Method, ...],
        arm: ArmSpec,
        seed: int,
        adapter: dict[str, Any] | None,
    ) -> Step:
        """Training with the methods that need it, then the checkpoint seam where a method has one."""
        acting = tuple(m for m in methods if not checkpoint_only(m))
        editing = tuple(m for m in methods if checkpoint_only(m))  # the others edit their result while they train
        memory = past if any(m.needs_past for m in acting) else []
        training = self._settings(tasks, arm)
        content = {
            "data": [task.train_hash for task in tasks],
            "memory": [(task.name, task.train_hash) for task in memory],
            "methods": [[m.name, m.settings()] for m in acting],
            "training": training,
            "seed": seed,
        }
        if adapter is not None:
            content["adapter"] = adapter
        step = Step(
            "train",
            content,
            start=start,
            base=self.base if acting else None,
            tasks=tuple(task.name for task in tasks),
            memory=tuple(task.name for task in memory),
            methods=acting,
            training=training,
            seed=seed,
            adapter=adapter or self.recipe.lora,
        )
        if not editing:
            return step
        content = {"methods": [[m.name, m.settings()] for m in editing]}
        return Step("edit", content, start=start, inputs=(step,), base=self.base, methods=editing, seed=seed)

    def _settings(self, tasks: list[TaskData], arm: ArmSpec) -> dict[str, Any]:
        """Recipe, then task, then arm; a joint training runs as many steps as its tasks have together."""
        each = [{**self.recipe.training, **task.spec.training, **arm.training} for task in tasks]
        settings = dict(each[0])
        if len(each) > 1 and any(e.get("max_steps", -1) > 0 for e in each) and "max_steps" not in arm.training:
            settings["max_steps"] = sum(e.get("max_steps", 0) for e in each)
        return settings
