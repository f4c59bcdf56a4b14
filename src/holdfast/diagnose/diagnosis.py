"""From a base, its checkpoints, plain text and a panel to a timeline with verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.diagnose.advice import advice, advise_run, contamination_notice
from holdfast.diagnose.compatible import check_checkpoints
from holdfast.diagnose.decomposition import Decomposition, decompose_benchmarks
from holdfast.diagnose.request import Request, choose_text
from holdfast.diagnose.selection import Selection
from holdfast.diagnose.timeline import marks
from holdfast.diagnose.workbench import Subject, Workbench, subject
from holdfast.errors import UserError
from holdfast.evaluate.intervals import mean_interval
from holdfast.files import write_json
from holdfast.models import source_hash

if TYPE_CHECKING:
    import pandas as pd

    from holdfast.evaluate.tasks import EvalTask

PROBES = (
    "label_mass",
    "choice_entropy",
    "vocab_entropy",
    "confidence",
)  # columns of ``measure`` that make the timeline


def diagnose(
    request: Request,
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda message: None,
    on_item: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure, restore and judge every checkpoint; the result is also ``out/diagnosis.json`` and ``out/items.parquet``.

    Base, checkpoint, restored checkpoint and the control (the base restored) answer the same items; drop = pattern
    shift + knowledge loss (paper 2, sections 3 and 4) for each benchmark and pooled. A verdict is withheld where
    restoring did not bring the probe perplexity back to the base's. Everything measured or trained is cached by
    content, so the same call continues after an interruption and a longer list of checkpoints pays for the new ones.
    Cost: per checkpoint two measurements and one restoring, and as much again for the base.
    Raises UserError before any work for checkpoints of another architecture or tokenizer.
    """
    out = Path(out)
    names = _names(request.checkpoints)
    warnings = check_checkpoints(request.base, request.checkpoints)
    identities = [source_hash(source) for source in (request.base, *request.checkpoints)]
    selection = choose_text(request, identities[0], out, say)
    bench = Workbench(out, say, on_item)
    one = _Run(request, selection, bench)
    base, control = one.both(subject(request.base, identities[0], "base"))
    warnings += [notice for task in request.scored if (notice := at_chance(task, base.column(task.name, "score")))]
    points = []
    for name, source, identity in zip(names, request.checkpoints, identities[1:]):
        who = subject(source, identity, name)
        if identity == identities[0]:
            warnings.append(f"{name}: its weights are the base's")
        tuned, restored = one.both(who)
        points.append(_point(name, source, tuned, restored, base, control, request))
    result = _result(request, selection, base, control, points, warnings)
    out.mkdir(parents=True, exist_ok=True)
    _items(base, control, points).to_parquet(out / "items.parquet")
    write_json(out / "diagnosis.json", result)
    return json.loads(json.dumps(result, default=str))


@dataclass
class _Measured:
    """One model's items, scores and probes."""

    items: pd.DataFrame
    perplexity: float
    memorization: float | None = None
    trajectory: list[tuple[float, float]] = field(default_factory=list)

    def column(self, task: str, name: str) -> list[float]:
        return [float(value) for value in self.items.loc[self.items["task"] == task, name]]

    def summary(self, tasks: Sequence[EvalTask]) -> dict[str, Any]:
        def mean(task: str, name: str) -> float | None:
            values = [v for v in self.column(task, name) if not math.isnan(v)] if name in self.items else []
            return sum(values) / len(values) if values else None

        return {
            "scores": {task.name: mean(task.name, "score") for task in tasks},
            "probes": {task.name: {probe: mean(task.name, probe) for probe in PROBES} for task in tasks},
            "perplexity": self.perplexity,
            "memorization": self.memorization,
            **({"trajectory": self.trajectory} if self.trajectory else {}),
        }


@dataclass
class _Run:
    request: Request
    selection: Selection
    bench: Workbench

    def both(self, who: Subject) -> tuple[_Measured, _Measured]:
        """The model as it is, and restored."""
        request, texts = self.request, [chosen.text for chosen in self.selection.restoring]
        probing = [chosen.text for chosen in self.selection.probing]
        plain = self._measure(who, probing)
        plain.memorization = self.bench.memorization(who, request.tuning)
        restored, trajectory = self.bench.restored(
            who, texts, probing, request.restoring, request.methods, request.max_tokens
        )
        who.release()
        after = self._measure(restored, probing)
        after.memorization = self.bench.memorization(restored, request.tuning)
        after.trajectory = trajectory
        restored.release()
        if not request.keep_restored:
            self.bench.drop_weights(restored)
        return plain, after

    def _measure(self, who: Subject, probing: list[str]) -> _Measured:
        items = self.bench.items(who, self.request.scored)
        return _Measured(items, self.bench.perplexity(who, probing, self.request.max_tokens))


def _point(
    name: str,
    source: str,
    tuned: _Measured,
    restored: _Measured,
    base: _Measured,
    control: _Measured,
    request: Request,
) -> dict[str, Any]:
    """One checkpoint of the timeline."""
    roles = {"base": base, "tuned": tuned, "restored": restored, "control": control}
    for role, measured in roles.items():
        same = measured.items[["task", "item"]].equals(base.items[["task", "item"]])
        assert same, f"{name}: {role} was measured on other items"
    arrays = {task.name: _usable(task.name, roles) for task in request.scored}
    found = decompose_benchmarks(arrays, margin=request.margin)
    if why := _not_restored(base.perplexity, restored.perplexity, control.perplexity, request.tolerance):
        found = {task: decomposition.withheld(why) for task, decomposition in found.items()}
    return {
        "name": name,
        "source": source,
        "epoch": _epoch(source),
        "tuned": tuned.summary(request.scored),
        "restored": restored.summary(request.scored),
        "decomposition": found,
        "advice": {task: advice(decomposition) for task, decomposition in found.items()},
        "measured": {"tuned": tuned, "restored": restored},
    }


def _usable(task: str, roles: dict[str, _Measured]) -> dict[str, list[float]]:
    """Scores of the items that every model could answer; an item with an error has none."""
    columns = {role: measured.column(task, "score") for role, measured in roles.items()}
    good = [not any(math.isnan(value) for value in values) for values in zip(*columns.values())]
    if not any(good):
        raise UserError(f"{task}: none of its items could be scored; `holdfast eval` lists the errors")
    return {role: [value for value, ok in zip(values, good) if ok] for role, values in columns.items()}


def _not_restored(base: float, restored: float, control: float, tolerance: float) -> str | None:
    """Why restoring can't be said to have worked, if it can't."""
    if restored <= base * (1 + tolerance):
        return None
    why = f"the probe perplexity after restoring is {restored:.2f}, the base's is {base:.2f}, so the format isn't back"
    if control > base * (1 + tolerance):
        why += f"; the control's rose to {control:.2f} too, so this text or training does not suit the base"
    return why


def _epoch(source: str) -> float | None:
    state = Path(source) / "trainer_state.json"
    return float(json.loads(state.read_text(encoding="utf-8")).get("epoch") or 0) if state.is_file() else None


def _names(checkpoints: Sequence[str]) -> list[str]:
    """The folders' names, or as much of the paths as tells them apart."""
    for depth in range(1, 1 + max(len(Path(source).parts) for source in checkpoints)):
        names = ["/".join(Path(source).parts[-depth:]) or source for source in checkpoints]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same checkpoint is given twice")


def _result(
    request: Request,
    selection: Selection,
    base: _Measured,
    control: _Measured,
    points: list[dict[str, Any]],
    warnings: list[str],
) -> dict[str, Any]:
    pooled: list[tuple[str, Decomposition]] = [(point["name"], point["decomposition"]["pooled"]) for point in points]
    if notice := contamination_notice(selection.account["contamination"]):
        warnings = [*warnings, notice]

    by_label = labelled(request.scored)

    def curve(probe: str) -> list[float]:
        """Mean over the benchmarks that are answered by label and have the probe."""
        values = []
        for point in points:
            probes = point["tuned"]["probes"]
            known = [v for task in by_label if (v := probes[task][probe]) is not None]
            values.append(sum(known) / len(known) if known else math.nan)
        return values

    stages = marks(curve("label_mass"), curve("choice_entropy"), [found.verdict for _, found in pooled])
    return {
        "format": 1,
        "base": {"source": request.base} | base.summary(request.scored),
        "control": control.summary(request.scored),
        "tasks": [_described(task, base) for task in request.scored],
        "text": selection.account | {"corpus": request.corpus},
        "restoring": asdict(request.restoring)
        | {"methods": [{"method": type(m).__name__, **asdict(m)} for m in request.methods]},
        "tolerance": request.tolerance,
        "margin": request.margin,
        "checkpoints": [
            {key: value for key, value in point.items() if key != "measured"}
            | {"decomposition": {task: found.to_dict() for task, found in point["decomposition"].items()}}
            for point in points
        ],
        "marks": stages.to_dict(),
        "advice": advise_run(pooled),
        "warnings": warnings,
    }


def at_chance(task: EvalTask, scores: Sequence[float]) -> str | None:
    """A warning if the base's score is not shown to be above chance; such a benchmark can show no loss."""
    known = [score for score in scores if not math.isnan(score)]
    if not known or not task.chance:
        return None
    value, low, high = (100 * number for number in mean_interval(known))
    if low > task.chance:
        return None
    return (
        f"{task.name}: the base scores {value:.1f} % [{low:.1f}, {high:.1f}], not shown to be above chance "
        f"({task.chance:g} %): it has nothing to lose here, and the pooled numbers only gain noise from it"
    )


def labelled(tasks: Sequence[EvalTask]) -> list[str]:
    """Benchmarks whose items all offer the same choices (A, B, …; yes, no), all benchmarks if there is none.

    Label mass tells of the format only where the answers are labels: answers in words compete with every other word.
    """
    names = [task.name for task in tasks if len({item.choices for item in task.items}) == 1 and task.items[0].choices]
    return names or [task.name for task in tasks]


def _described(task: EvalTask, measured: _Measured) -> dict[str, Any]:
    errors = sum(math.isnan(value) for value in measured.column(task.name, "score"))
    return {"name": task.name, "items": len(task.items), "errors": errors, "chance": task.chance}


def _items(base: _Measured, control: _Measured, points: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    frames = [m.items.assign(checkpoint="base", role=role) for role, m in (("base", base), ("control", control))]
    for point in points:
        frames += [m.items.assign(checkpoint=point["name"], role=role) for role, m in point["measured"].items()]
    return pd.concat(frames, ignore_index=True)
