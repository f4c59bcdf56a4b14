"""How an independent arm's models become one: checked before any training, then carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError, did_you_mean
from holdfast.files import digest
from holdfast.recipe import MergeSpec

if TYPE_CHECKING:
    from holdfast.study.plan import Step
    from holdfast.study.streams import TaskData

ESTIMATE: dict[str, Any] = {"kind": "empirical", "samples": 256, "batch": 8}  # `merge: fisher`, as `holdfast fisher`


def merge_content(merge: MergeSpec, models: int, tasks: int, seed: int) -> dict[str, Any]:
    """What decides the merge of an arm's first ``models`` models, of as many as there are ``tasks``.

    ``weights`` has one number per task, of which the first ones count; DARE's masks follow the study's seed unless
    ``seed`` is given; ``fisher`` (``normalize``) estimates each model's Fisher information on its own task's training
    data (``kind``, ``samples``, ``batch``). Raises UserError for anything the merge would refuse.
    """
    from holdfast.merge.families import resolve
    from holdfast.merge.plan import check_method

    settings = dict(merge.settings)
    try:
        name, _ = resolve(merge.method, {})
        weights = settings.pop("weights", None)
        if isinstance(weights, list):
            if len(weights) != tasks:
                raise UserError(f"{len(weights)} weights for {tasks} tasks: give one weight a task.")
            weights = weights[:models]
        estimate = None
        if name == "fisher":
            normalize = {"normalize": settings.pop("normalize")} if "normalize" in settings else {}
            estimate, settings = _estimate(settings), normalize
        check_method(name, models, weights, settings)
    except UserError as error:
        raise UserError(f"merge: {error}") from None
    if name == "dare":
        settings.setdefault("seed", seed)
    if weights is not None:
        settings["weights"] = weights
    content: dict[str, Any] = {"method": merge.method, "settings": settings}
    return content if estimate is None else {**content, "fisher": estimate}


def _estimate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How Fisher information is estimated: the defaults and what the recipe says of them."""
    from holdfast.merge.fisher_file import KINDS

    for key in settings:
        if key not in ESTIMATE:
            known = [*ESTIMATE, "normalize"]
            raise UserError(f"method 'fisher' has no setting '{key}' in a study.{did_you_mean(key, known)}")
    found = {**ESTIMATE, **settings}
    if found["kind"] not in KINDS:
        raise UserError(f"kind '{found['kind']}' is unknown.{did_you_mean(str(found['kind']), KINDS)}")
    for key in ("samples", "batch"):
        if not isinstance(found[key], int) or found[key] < 1:
            raise UserError(f"{key} must be a whole number of at least 1, not {found[key]!r}.")
    return found


def merge_step(step: Step, folder: Callable[[Step], Path], data: Mapping[str, TaskData], root: Path, out: Path) -> None:
    """Carry out a merge of a study in the run directory ``root``: the models of ``step`` become ``out``."""
    from holdfast.merge import merge_checkpoints

    assert step.start is not None
    settings = dict(step.content["settings"])
    estimate = step.content.get("fisher")
    if estimate is not None:
        settings["fisher"] = [_fisher(tuned, estimate, folder(tuned), data, root) for tuned in step.inputs]
    models = [folder(tuned) for tuned in step.inputs]
    merge_checkpoints(step.content["method"], models, out, folder(step.start), **settings)


def _fisher(tuned: Step, estimate: Mapping[str, Any], model: Path, data: Mapping[str, TaskData], root: Path) -> Path:
    """Fisher information of one model on its own task's training data, as a file that later merges find again."""
    from holdfast.merge.fisher_file import compute_fisher, save_fisher
    from holdfast.models import load_model
    from holdfast.probe import on_device

    trained = tuned if tuned.kind == "train" else tuned.inputs[0]
    about = {"model": tuned.key, "task": trained.tasks[0], "seed": tuned.seed, **estimate}
    path = root / "fishers" / f"{digest(about)}.safetensors"
    if not path.exists():
        loaded, tokenizer = load_model(model, dtype="float32")
        length = trained.training.get("max_length", 1024)
        examples = data[trained.tasks[0]].train
        values = compute_fisher(on_device(loaded), tokenizer, examples, max_length=length, seed=tuned.seed, **estimate)
        save_fisher(path, values, about)
    return path
