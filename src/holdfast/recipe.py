"""Recipes: strict YAML <-> frozen models, with ``key=value`` overrides and "did you mean" for every slip.

A recipe names a model, a stream of tasks, a panel of general abilities and the arms to compare::

    model: lab
    tasks: [{source: "lab:math"}, {source: "lab:law"}]
    panel: lab
    arms:
      sequential: []
      sfa: [{sfa: {p: 0.25}}]
      joint: joint
    seeds: [0]
    training: {learning_rate: 1.0e-3, num_train_epochs: 3}

``training`` takes the keys of TRL's ``SFTConfig`` (hence of ``TrainingArguments``) and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from holdfast.errors import UserError, did_you_mean
from holdfast.recipe_file import find_recipe, override, read_yaml

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"  # names become folder names, table rows and YAML keys
RESERVED_TRAINING = {
    "output_dir": "give --out on the command line",
    "seed": "use the recipe's `seeds`",
    "data_seed": "use the recipe's `seeds`",
    "deepspeed": "methods need the gradients and weights of a step; use DDP or FSDP2",
    "eval_dataset": "checkpoints are measured on the tasks and the panel",
}


class Strict(BaseModel):
    """Base of all recipe models: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EvalSpec(Strict):
    """How one set of questions is read and scored.

    With ``choices`` the likeliest choice is compared with the answer; with ``metric: perplexity`` plain text is scored;
    otherwise the greedy completion must equal the answer (``exact_match``; ``numeric_match``: as a number), both after
    ``extract``.
    """

    name: str = Field(default="", pattern=NAME + "|^$")
    source: str | None = None  # "lab:math", or a hub data set id holding both splits
    test: str | None = None  # file, folder or hub data set id
    test_split: str | None = None
    format: str = "auto"
    columns: dict[str, str] | None = None
    prompt: str | None = None  # template over the file's columns, e.g. "Question: {question}\nAnswer:"
    completion: str | None = None
    choices: str | list[str] | None = None  # fixed choices, or the column that holds each row's
    choice: str = " {choice}"  # template of one choice's text after the prompt
    # the right answer: with `choices` the column of its index or text (default "answer"); else a column or template of
    # what must be generated, for example "{final:number}"
    answer: str | None = None
    metric: Literal["acc", "acc_norm", "exact_match", "numeric_match", "perplexity"] | None = None
    extract: str | None = None  # regular expression; group 1 of its last match is compared
    stop: list[str] = ["\n"]
    max_new_tokens: int = Field(default=64, ge=1)
    test_limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _name_from_source(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"source": value}
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("source"), str):
            return {**value, "name": re.sub(r"[^A-Za-z0-9_.+-]", "-", value["source"].removeprefix("lab:"))}
        return value

    @model_validator(mode="after")
    def _has_a_test(self) -> EvalSpec:
        if not self.name:
            raise ValueError("a task needs a `name`")
        if self.source is None and self.test is None:
            raise ValueError("give `source` (for example lab:math) or `test` (a file, folder or hub data set)")
        if self.extract is not None:
            try:
                pattern = re.compile(self.extract)
            except re.error as error:
                raise ValueError(f"`extract` is not a regular expression: {error}") from None
            if pattern.groups < 1:
                raise ValueError("`extract` needs one group, for example '#### (-?[0-9.]+)'")
        return self


class TaskSpec(EvalSpec):
    """One task of the stream: what it trains on, and how it is scored."""

    train: str | None = None
    train_split: str | None = None
    train_limit: int | None = Field(default=None, ge=1)
    training: dict[str, Any] = {}  # overrides of the recipe's training, for this task

    @model_validator(mode="after")
    def _has_training_data(self) -> TaskSpec:
        if self.source is None and self.train is None:
            raise ValueError("give `train` (a file, folder or hub data set), or `source`")
        return self


def _method_entry(value: Any) -> Any:
    """``sam`` and ``{sam: {rho: 0.05}}`` -> {"sam": {…}}."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict) and len(value) == 1:
        ((name, settings),) = value.items()
        if settings is None:
            return {name: {}}
        if isinstance(settings, dict):
            return value
    raise ValueError("a method is written `sam` or `{sam: {rho: 0.05}}`")


MethodEntry = Annotated[dict[str, dict[str, Any]], BeforeValidator(_method_entry)]
WAYS = ("sequential", "joint", "independent")


class MergeSpec(Strict):
    """How the models of an ``independent`` arm become one; settings go to the merge method."""

    method: str = "task_arithmetic"
    settings: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"method": value}
        if isinstance(value, dict) and "settings" not in value:
            return {
                "method": value.get("method", "task_arithmetic"),
                "settings": {k: v for k, v in value.items() if k != "method"},
            }
        return value


class ArmSpec(Strict):
    """One way to train through the stream: a list of methods, `joint`, or `independent` with a merge."""

    train: Literal["sequential", "joint", "independent"] = "sequential"
    methods: list[MethodEntry] = []
    from_task: int = Field(default=2, ge=1)  # the methods act from this task on; 2 as in the papers
    merge: MergeSpec | None = None
    peft: dict[str, Any] | None = None  # train a fresh PEFT adapter in these tasks, as `lora` does for all arms
    training: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, list):
            return {"methods": value}
        if isinstance(value, str):
            return {"train": value} if value in WAYS else {"methods": [value]}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ArmSpec:
        if self.merge is not None and self.train != "independent":
            raise ValueError("`merge` needs `train: independent`")
        if self.train == "joint" and self.methods and self.from_task > 1:
            raise ValueError("a joint arm has one training, which is task 1: add `from_task: 1` to use methods in it")
        return self


class PanelSpec(Strict):
    """The general abilities measured at every checkpoint: a named panel and/or tasks of your own."""

    name: str | None = None
    limit: int | None = Field(default=None, ge=1)
    local_data: str | None = None
    tasks: list[EvalSpec] = []

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, list):
            return {"tasks": value}
        return value


class Recipe(Strict):
    """A study: arms × seeds on one stream of tasks."""

    name: str = Field(default="study", pattern=NAME)
    model: str
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    lora: dict[str, Any] | None = None
    data_dir: str | None = None  # relative paths of tasks and panel start here; default: the current folder
    tasks: list[TaskSpec] = Field(min_length=1)
    panel: PanelSpec | None = None
    arms: dict[Annotated[str, Field(pattern=NAME)], ArmSpec] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    training: dict[str, Any] = {}
    batch_tokens: int | None = Field(default=None, ge=1)  # tokens per evaluation batch; default: chosen by the engine

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for what, names in (
            ("tasks", [t.name for t in self.tasks]),
            ("panel.tasks", [t.name for t in self.panel.tasks] if self.panel else []),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what}: the name '{name}' is used twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is listed twice")
        return self

    def identity(self) -> dict[str, Any]:
        """What a run directory belongs to; arms, seeds, panel and bookkeeping may grow without changing it."""
        return self.model_dump(include={"model", "dtype", "lora", "tasks", "training"}, mode="json")


# ---------------------------------------------------------------- loading


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe: a built-in name, a YAML file, or a mapping; ``overrides`` are ``key=value`` texts.

    Raises UserError that names the file and key, what was expected, and the nearest valid name.
    """
    if isinstance(source, Mapping):
        data, where = dict(source), "recipe"
    else:
        path = find_recipe(source)
        data, where = read_yaml(path), str(path)
        data.setdefault("name", path.stem)
    for text in overrides:
        override(data, text)
    return _validate(data, where)


def _validate(data: Mapping[str, Any], where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, where)) from None
    _check_training(recipe, where)
    _check_adapters(recipe, where)
    _check_methods(recipe, where)
    return recipe


def _explain(error: ValidationError, where: str) -> str:
    """The first problem in plain words, with its key; the number of further ones."""
    problems = error.errors()
    # an unknown key explains the missing ones beside it: show it first
    first = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        fields = _fields_at(first["loc"][:-1])
        return f"{where}: unknown key '{key}'.{did_you_mean(str(first['loc'][-1]), fields)}{more}"
    if first["type"] == "missing":
        return f"{where}: '{key}' is missing.{more}"
    message = first["msg"].removeprefix("Value error, ")
    got = f", got {first['input']!r}" if isinstance(first["input"], str | int | float | bool) else ""
    return f"{where}: {key}: {message}{got}.{more}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the recipe part at a pydantic location."""
    models: dict[str, type[Strict]] = {"tasks": TaskSpec, "arms": ArmSpec, "panel": PanelSpec, "merge": MergeSpec}
    named = [str(part) for part in location if str(part) in models]
    if not named:
        return list(Recipe.model_fields)
    if "panel" in named and "tasks" in named:
        return list(EvalSpec.model_fields)
    return list(models[named[-1]].model_fields)


def _check_training(recipe: Recipe, where: str) -> None:
    """Every training key is a field of SFTConfig, and none that the study sets itself."""
    places = [("training", recipe.training)]
    places += [(f"tasks.{task.name}.training", task.training) for task in recipe.tasks]
    places += [(f"arms.{name}.training", arm.training) for name, arm in recipe.arms.items()]
    if not any(settings for _, settings in places):
        return
    import dataclasses

    from trl import SFTConfig

    valid = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    for place, settings in places:
        for key in settings:
            if key in RESERVED_TRAINING:
                raise UserError(f"{where}: '{place}.{key}' can't be set in a recipe: {RESERVED_TRAINING[key]}.")
            if key not in valid:
                raise UserError(
                    f"{where}: unknown key '{place}.{key}': not a setting of TRL's SFTConfig.{did_you_mean(key, valid)}"
                )


def _check_adapters(recipe: Recipe, where: str) -> None:
    """Every adapter's type and keys are PEFT's."""
    places = [(f"arms.{name}.peft", arm.peft) for name, arm in recipe.arms.items() if arm.peft is not None]
    if recipe.lora is not None:
        places.append(("lora", recipe.lora))
        if len(places) > 1:
            raise UserError(
                f"{where}: '{places[0][0]}' would wrap a model that the recipe's `lora` has wrapped already."
            )
    for place, settings in places:
        from holdfast.adapters import check_adapter

        check_adapter(settings, f"{where}: {place}")


def _check_methods(recipe: Recipe, where: str) -> None:
    """Build every method once, so that unknown names and values outside their range are found before any work."""
    from holdfast.method import from_spec

    for arm_name, arm in recipe.arms.items():
        for entry in arm.methods:
            ((name, settings),) = entry.items()
            try:
                from_spec(name, settings)
            except UserError as error:
                raise UserError(f"{where}: arms.{arm_name}: {error}") from None
