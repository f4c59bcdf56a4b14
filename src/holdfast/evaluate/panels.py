"""Panels: named, versioned lists of tasks. A panel with equal hash asks the same questions in the same words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from holdfast.errors import UserError, did_you_mean
from holdfast.evaluate.formats import FORMATS, solution
from holdfast.evaluate.panel_data import SUFFIXES, Hub, Row, find_rows, sample_items
from holdfast.evaluate.tasks import EvalTask, Item

NUMBER = r"(-?\$?\d[\d,]*(?:\.\d+)?)"


@dataclass(frozen=True)
class Entry:
    """One task of a panel. ``files``: names looked for (without suffix); ``hub``: data set, configuration, split.

    ``shots`` worked examples come before each item, the first ones of ``shot_files`` (of the item's subject for MMLU),
    the same for every item, so that their prefix is run once. ``limit`` items are drawn by seed, evenly over groups.
    """

    name: str
    format: str
    files: tuple[str, ...]
    hub: Hub | None = None
    kind: Literal["choice", "generate", "perplexity"] = "choice"
    metric: str = "acc"
    chance: float = 0.0
    shots: int = 0
    shot_files: tuple[str, ...] = ()
    shot_hub: Hub | None = None
    limit: int | None = None
    extract: str | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 64
    separator: str = "\n\n"


@dataclass(frozen=True)
class Panel:
    """A named, versioned list of entries; ``version`` rises when a number could change."""

    name: str
    version: int
    about: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Built:
    """The tasks of a panel, and the entries for which no data was found."""

    panel: str
    version: int
    tasks: tuple[EvalTask, ...]
    missing: tuple[str, ...] = ()


MMLU = Entry(
    "mmlu",
    "mmlu",
    ("mmlu_test",),
    ("cais/mmlu", "all", "test"),
    chance=25.0,
    shots=5,
    shot_files=("mmlu_dev",),
    shot_hub=("cais/mmlu", "all", "dev"),
)
ARC = Entry(
    "arc_challenge", "question", ("arc_challenge_test",), ("allenai/ai2_arc", "ARC-Challenge", "test"), chance=25.0
)
HELLASWAG = Entry(
    "hellaswag",
    "hellaswag",
    ("hellaswag_validation",),
    ("Rowan/hellaswag", None, "validation"),
    metric="acc_norm",
    chance=25.0,
)
COPA = Entry("copa", "copa", ("copa_dev",), ("aps/super_glue", "copa", "validation"), chance=50.0)
OPENBOOKQA = Entry("openbookqa", "stem", ("openbookqa_test",), ("allenai/openbookqa", "main", "test"), chance=25.0)

PAPER1 = Panel(
    "paper1",
    1,
    "the 13 benchmarks of arXiv 2406.04836; `holdfast.metrics.group_table` makes its four groups",
    (
        MMLU,
        Entry(
            "race_middle", "race", ("race_middle_test", "race_middle"), ("ehovy/race", "middle", "test"), chance=25.0
        ),
        Entry("race_high", "race", ("race_high_test", "race_high"), ("ehovy/race", "high", "test"), chance=25.0),
        replace(OPENBOOKQA, name="openbookqa_fact", hub=("allenai/openbookqa", "additional", "test")),
        Entry("csl_dev", "csl", ("csl_dev",), ("clue/clue", "csl", "validation"), chance=50.0),
        Entry("boolq", "boolq", ("boolq_validation", "boolq"), ("google/boolq", None, "validation"), chance=50.0),
        Entry("ax_b", "entailment", ("ax_b", "axb"), ("aps/super_glue", "axb", "test"), chance=50.0),
        Entry("ax_g", "entailment", ("ax_g", "axg"), ("aps/super_glue", "axg", "test"), chance=50.0),
        Entry("rte", "entailment", ("rte_validation", "rte"), ("aps/super_glue", "rte", "validation"), chance=50.0),
        COPA,
        HELLASWAG,
        Entry("siqa", "siqa", ("siqa_validation", "siqa"), ("allenai/social_i_qa", None, "validation"), chance=100 / 3),
        ARC,
    ),
)
SFA = Panel(
    "sfa",
    1,
    "the tasks of arXiv 2501.05559: GSM8K, CaseHOLD, ToS, Overruling, HumanEval",
    (
        Entry(
            "gsm8k",
            "gsm8k",
            ("gsm8k_test",),
            ("openai/gsm8k", "main", "test"),
            kind="generate",
            metric="numeric_match",
            extract=NUMBER,
            stop=("Question:", "\n\n\n"),
            max_new_tokens=256,
        ),
        Entry("casehold", "casehold", ("casehold_test",), ("casehold/casehold", "all", "test"), chance=20.0),
        Entry("tos", "tos", ("tos_test", "terms_of_service_test", "tos"), None, chance=50.0),
        Entry("overruling", "overruling", ("overruling_test",), None, chance=50.0),
        Entry(
            "humaneval",
            "humaneval",
            ("HumanEval", "humaneval"),
            ("openai/openai_humaneval", None, "test"),
            kind="generate",
            metric="pass@1",
            shots=5,
            shot_files=("HumanEval", "humaneval"),
            shot_hub=("openai/openai_humaneval", None, "test"),
            stop=("\nclass ", "\ndef ", "\nif __name__", "\nprint(", "\n#"),
            max_new_tokens=384,
            separator="\n\n",
        ),
    ),
)
QUICK = Panel(
    "quick",
    1,
    "a few hundred items of seven tasks: minutes on one accelerator",
    (
        replace(HELLASWAG, limit=300),
        Entry(
            "arc_easy", "question", ("arc_easy_test",), ("allenai/ai2_arc", "ARC-Easy", "test"), chance=25.0, limit=300
        ),
        replace(MMLU, limit=342),
        replace(COPA, limit=300),
        replace(OPENBOOKQA, limit=300),
        Entry(
            "piqa",
            "question",
            ("piqa_validation",),
            ("ybisk/piqa", None, "validation"),
            metric="acc_norm",
            chance=50.0,
            limit=300,
        ),
        Entry(
            "wikitext2",
            "text",
            ("wikitext2_test",),
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
            kind="perplexity",
            metric="perplexity",
            limit=20,
        ),
    ),
)
PANELS: dict[str, Panel] = {panel.name: panel for panel in (PAPER1, SFA, QUICK)}
NAMES = (*PANELS, "lab")


def build(name: str, *, local_data: Path | None = None, limit: int | None = None, seed: int = 0) -> Built:
    """The tasks of a panel, from files below ``local_data`` or else from the hub. ``limit`` bounds items per task.

    Entries whose data is not found are named in ``missing``; UserError if that leaves nothing, or the panel is unknown.
    """
    if name == "lab":
        from holdfast import lab

        return Built("lab", 1, tuple(_limited(task, limit, seed) for task in lab.panel()))
    if name not in PANELS:
        raise UserError(f"unknown panel '{name}'.{did_you_mean(name, NAMES)}")
    if local_data is not None and not local_data.is_dir():
        raise UserError(f"--local-data {local_data}: no such folder.")
    panel = PANELS[name]
    tasks, missing = [], []
    for entry in panel.entries:
        rows = find_rows(entry.files, entry.hub, local_data)
        if rows is None:
            missing.append(entry.name)
            continue
        tasks.append(_task(entry, rows, local_data, limit, seed))
    if not tasks:
        place = f"below {local_data}" if local_data else "on the hub"
        wanted = ", ".join(name for entry in panel.entries for name in entry.files[:1])
        raise UserError(
            f"panel '{name}': none of its files was found {place}. Looked for {wanted} with {SUFFIXES[0]} or so."
        )
    return Built(panel.name, panel.version, tuple(tasks), tuple(missing))


def load_panel(name: str, *, local_data: Path | str | None = None, limit: int | None = None) -> list[EvalTask]:
    """The tasks of a panel as a list; entries without data are left out with a warning. See `build`."""
    built = build(name, local_data=None if local_data is None else Path(local_data), limit=limit)
    if built.missing:
        warnings.warn(f"panel '{name}': no data for {', '.join(built.missing)}; measured without.", stacklevel=2)
    return list(built.tasks)


def _limited(task: EvalTask, limit: int | None, seed: int) -> EvalTask:
    return task if limit is None else replace(task, items=tuple(sample_items(task.items, limit, seed)))


def _task(entry: Entry, rows: list[Row], local_data: Path | None, limit: int | None, seed: int) -> EvalTask:
    shots = entry.shots if entry.format == "humaneval" else 0
    items = [_item(entry, str(k), row, k) for k, row in enumerate(rows) if k >= shots]
    bounds = [bound for bound in (entry.limit, limit) if bound is not None]
    chosen = sample_items(items, min(bounds), seed) if bounds else items
    prefixes = _prefixes(entry, local_data)
    return EvalTask(
        entry.name,
        entry.kind,
        tuple(replace(item, prompt=prefixes(item) + item.prompt) for item in chosen),
        metric=entry.metric,
        chance=entry.chance,
        extract=entry.extract,
        stop=entry.stop,
        max_new_tokens=entry.max_new_tokens,
    )


def _item(entry: Entry, id_: str, row: Row, number: int) -> Item:
    try:
        return FORMATS[entry.format](id_, row)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        about = (FORMATS[entry.format].__doc__ or "").splitlines()[0]
        raise UserError(f"{entry.name}, row {number + 1}: {error!r}; expected {about}") from error


def _prefixes(entry: Entry, local_data: Path | None) -> Callable[[Item], str]:
    """item -> the text of its worked examples; the same text for all items of a group."""
    header = (
        "The following are multiple choice questions (with answers) about {}.\n\n" if entry.format == "mmlu" else ""
    )
    if not entry.shots:
        return lambda item: header.format(item.group.replace("_", " "))
    rows = find_rows(entry.shot_files, entry.shot_hub, local_data)
    if rows is None:
        raise UserError(f"{entry.name}: no file {entry.shot_files[0]} for its {entry.shots} worked examples.")
    texts: dict[str, list[str]] = {}
    for k, row in enumerate(rows):
        item = _item(entry, str(k), row, k)
        group = item.group if entry.format == "mmlu" else ""
        worked = texts.setdefault(group, [])
        if len(worked) < entry.shots:
            worked.append(item.prompt + solution(entry.format, item, row) + entry.separator)

    def prefix(item: Item) -> str:
        group = item.group if entry.format == "mmlu" else ""
        return header.format(item.group.replace("_", " ")) + "".join(texts.get(group, []))

    return prefix
