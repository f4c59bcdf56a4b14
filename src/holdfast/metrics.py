"""Forgetting and transfer as pure functions of a score matrix, every convention by name; paper 1's group table.

``R[i, j]`` is the score on task j after training on task i (row by row in time). Scores are percent, higher is better.
Costs are those of a few numpy operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from holdfast.errors import UserError, did_you_mean

Array = NDArray[np.float64]
Convention = Literal["drop", "chaudhry", "last"]
CONVENTIONS = ("drop", "chaudhry", "last")

# Hendrycks et al. count the 57 MMLU subjects so; with these weights Table 5 of arXiv 2406.04836 gives its Table 2.
MMLU_SUBJECTS = {"mmlu_stem": 18, "mmlu_humanities": 13, "mmlu_social_sciences": 12, "mmlu_other": 14}

PAPER1_GROUPS: dict[str, tuple[str, ...]] = {
    "DK": ("mmlu",),
    "Understanding": ("race_middle", "race_high", "openbookqa_fact", "csl_dev"),
    "Reasoning": ("boolq", "ax_b", "ax_g", "rte", "copa", "hellaswag", "siqa"),
    "Exams": ("arc_challenge",),
}
GROUPS = {"paper1": PAPER1_GROUPS}


def _matrix(scores: ArrayLike, square: bool = True) -> Array:
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UserError(f"the score matrix must be 2-dimensional and not empty, got shape {matrix.shape}.")
    if square and matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"needs one row and one column per task, got shape {matrix.shape}.")
    return matrix


def _initial(initial: ArrayLike | None, matrix: Array) -> Array | None:
    if initial is None:
        return None
    before = np.asarray(initial, dtype=np.float64)
    if before.shape != (matrix.shape[1],):
        raise UserError(f"initial needs one score per task ({matrix.shape[1]}), got shape {before.shape}.")
    return before


def average_accuracy(R: ArrayLike) -> float:
    """Mean score over all tasks after the last one: ACC = 1/T · Σ_j R[T−1, j] (Lopez-Paz & Ranzato 2017)."""
    return float(_matrix(R, square=False)[-1].mean())


def learning_accuracy(R: ArrayLike) -> float:
    """Mean score on each task just after it was learned: 1/T · Σ_j R[j, j]; what was given up for stability."""
    return float(np.diag(_matrix(R)).mean())


def average_incremental_accuracy(R: ArrayLike) -> float:
    """Mean over checkpoints of the mean score on the tasks seen so far: 1/T · Σ_i mean_{j≤i} R[i, j]."""
    matrix = _matrix(R)
    return float(np.mean([matrix[i, : i + 1].mean() for i in range(len(matrix))]))


def forgetting_per_task(R: ArrayLike, convention: Convention = "drop", initial: ArrayLike | None = None) -> Array:
    """Forgetting of each task, shape [T−1] (the task learned last can't be forgotten yet); see `forgetting`.

    A matrix with more columns than rows also holds benchmarks that were never trained on; then every column counts
    and ``initial`` is needed.
    """
    if convention not in CONVENTIONS:
        raise UserError(f"unknown forgetting convention '{convention}'.{did_you_mean(convention, CONVENTIONS)}")
    matrix = _matrix(R, square=initial is None)
    before = _initial(initial, matrix)
    tasks = matrix.shape[0] - 1 if matrix.shape[0] == matrix.shape[1] else matrix.shape[1]
    final = matrix[-1, :tasks]
    if convention == "chaudhry":
        rows = matrix[:-1] if before is None else np.vstack([before, matrix[:-1]])
        earlier = rows[:, :tasks]
        if np.isnan(earlier).all(axis=0).any():
            raise UserError("chaudhry needs a score from an earlier checkpoint for every task.")
        return np.asarray(np.nanmax(earlier, axis=0) - final) if tasks else np.empty(0)
    if convention == "drop" and before is not None:
        return np.asarray(before[:tasks] - final)
    if matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"'{convention}' needs one row and one column per task, got shape {matrix.shape}.")
    return np.asarray(np.diag(matrix)[:tasks] - final)


def forgetting(R: ArrayLike, convention: Convention = "drop", initial: ArrayLike | None = None) -> float:
    """Mean forgetting over the tasks before the last one, in the unit of R; positive means forgotten.

    ``drop``: score before − score now. Before is ``initial`` (one score per task, the base model's) if given, else the
    score when the task was just learned, as in both papers. ``chaudhry``: max over the earlier checkpoints (``initial``
    among them if given) − final (Chaudhry et al. 2018, eq. 3). ``last``: just learned − final, that is −BWT, whatever
    ``initial`` says. NaN marks what was not measured. One task alone gives NaN: nothing could be forgotten yet.
    Raises UserError for an unknown convention or a shape that does not fit.
    """
    values = forgetting_per_task(R, convention, initial)
    return float(values.mean()) if len(values) else float("nan")


def backward_transfer(R: ArrayLike) -> float:
    """BWT = 1/(T−1) · Σ_{j<T−1} (R[T−1, j] − R[j, j]) (Lopez-Paz & Ranzato 2017); negative means forgotten."""
    return -forgetting(R, "last")


def forward_transfer(R: ArrayLike, initial: ArrayLike) -> float:
    """FWT = 1/(T−1) · Σ_{j≥1} (R[j−1, j] − initial[j]) (Lopez-Paz & Ranzato 2017).

    ``initial[j]`` is the score on task j before any training. One task alone gives NaN.
    """
    matrix = _matrix(R)
    before = _initial(initial, matrix)
    if before is None:
        raise UserError("forward transfer needs initial: each task's score before any training.")
    tasks = np.arange(1, len(matrix))
    return float((matrix[tasks - 1, tasks] - before[tasks]).mean()) if len(tasks) else float("nan")


def relative_drop(before: float, now: float) -> float:
    """Drop in percent of the score before: 100 · (before − now) / before; NaN if before is 0."""
    return 100.0 * (before - now) / before if before else float("nan")


def _with_mmlu(scores: Mapping[str, float]) -> dict[str, float]:
    """Fill `mmlu` (mean over the 57 subjects) from the four subject groups where only those are given."""
    if "mmlu" in scores or not all(name in scores for name in MMLU_SUBJECTS):
        return dict(scores)
    total = sum(scores[name] * count for name, count in MMLU_SUBJECTS.items())
    return {**scores, "mmlu": total / sum(MMLU_SUBJECTS.values())}


def group_table(
    rows: Mapping[str, Mapping[str, float]],
    groups: str | Mapping[str, Sequence[str]] = "paper1",
    baseline: str | Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Mean score per group, AVG over the groups, and the change against a baseline row (arXiv 2406.04836, Table 2).

    ``rows`` maps a row's name to {benchmark: percent}. groups "paper1": DK = mmlu (or its four subject groups
    mmlu_stem, mmlu_humanities, mmlu_social_sciences, mmlu_other, weighted 18, 13, 12, 14 by subjects), Understanding,
    Reasoning, Exams; AVG = mean of the groups. ``baseline`` is one row for all, or {row: its baseline} (in Table 2 a
    SAM row is compared with the same data without SAM, any other row with Alpaca). Returns one row per row of ``rows``
    with the groups, AVG, delta (points, NaN without a baseline) and relative_delta (percent of the baseline's AVG).
    Nothing is rounded. Raises UserError for a benchmark or baseline that is missing.
    """
    if isinstance(groups, str) and groups not in GROUPS:
        raise UserError(f"unknown groups '{groups}'.{did_you_mean(groups, GROUPS)}")
    members: Mapping[str, Sequence[str]] = GROUPS[groups] if isinstance(groups, str) else groups
    values: dict[str, dict[str, float]] = {}
    for row, given in rows.items():
        scores = _with_mmlu(given)
        for name in (name for names in members.values() for name in names):
            if name not in scores:
                raise UserError(f"row '{row}' has no score for '{name}'.{did_you_mean(name, scores)}")
        values[row] = {group: sum(scores[n] for n in names) / len(names) for group, names in members.items()}
        values[row]["AVG"] = sum(values[row].values()) / len(members)
    of = {row: baseline for row in rows if row != baseline} if isinstance(baseline, str) else dict(baseline or {})
    for row, against in of.items():
        for name in (row, against):
            if name not in values:
                raise UserError(f"there is no row '{name}' to compare.{did_you_mean(name, values)}")
    table: dict[str, dict[str, Any]] = {}
    for row, means in values.items():
        reference = values[of[row]]["AVG"] if row in of else float("nan")
        delta = means["AVG"] - reference
        table[row] = {
            **means,
            "delta": delta,
            "relative_delta": 100.0 * delta / reference if reference else float("nan"),
        }
    return pd.DataFrame.from_dict(table, orient="index", columns=[*members, "AVG", "delta", "relative_delta"])
