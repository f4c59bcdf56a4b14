"""What the probe columns of `measure` mean, and their means per task (arXiv: "Pattern Shifting or Knowledge Losing?").

label_mass: probability, over the whole vocabulary and right after the prompt, of the valid answer labels, with and
without a leading space ("A" and " A"); NaN where a label is not one token. Near 1 the model knows the format.
choice_entropy: entropy in nats of the choices' renormalised probabilities. vocab_entropy: of the next token over the
whole vocabulary. confidence: renormalised probability of the choice taken. memorization: share of the right answer's
tokens that are the argmax under teacher forcing (section 5.1; for perplexity tasks, of all tokens).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from holdfast.errors import UserError

PROBES = ("label_mass", "choice_entropy", "vocab_entropy", "confidence", "memorization")
_UNITS = {"token": "weight", "word": "words", "byte": "bytes"}


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: Σ_b n_b/n · |accuracy_b − confidence_b|, equal-width bins (Guo et al. 2017)."""
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if sure.shape != right.shape or sure.ndim != 1:
        raise UserError(f"confidence and correct need the same length, got {sure.shape} and {right.shape}.")
    if not len(sure):
        return float("nan")
    which = np.clip((sure * bins).astype(int), 0, bins - 1)
    gap = np.bincount(which, right - sure, minlength=bins)
    return float(np.abs(gap).sum() / len(sure))


def probe_table(items: pd.DataFrame) -> pd.DataFrame:
    """Means of the probes per task, with the calibration error, over the items that were scored."""
    table = []
    for name, rows in items[items["score"].notna()].groupby("task", sort=False):
        row: dict[str, object] = {"task": name}
        for probe in PROBES:
            row[probe] = float(rows[probe].mean()) if probe in rows else float("nan")
        if "confidence" in rows and rows["confidence"].notna().any():
            known = rows[rows["confidence"].notna()]
            row["calibration_error"] = calibration_error(known["confidence"], known["score"])
        table.append(row)
    return pd.DataFrame(table, columns=["task", *PROBES, "calibration_error"])


def perplexities(items: pd.DataFrame) -> pd.DataFrame:
    """Perplexity per token, word and UTF-8 byte, and bits per byte, of each perplexity task: exp(Σ nats / Σ unit)."""
    table = []
    scored = items[(items["metric"] == "perplexity") & items["score"].notna()]
    for name, rows in scored.groupby("task", sort=False):
        nats = float(rows["score"].sum())
        per = {unit: nats / float(rows[column].sum()) for unit, column in _UNITS.items()}
        values = {unit: float(np.exp(min(x, 700.0))) for unit, x in per.items()}
        table.append({"task": name, **values, "bits_per_byte": per["byte"] / np.log(2)})
    return pd.DataFrame(table, columns=["task", *_UNITS, "bits_per_byte"])
