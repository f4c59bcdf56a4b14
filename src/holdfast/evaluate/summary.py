"""summarize: one row per task with an interval."""

from __future__ import annotations

import math

import pandas as pd

from holdfast.evaluate.intervals import mean_interval, ratio_interval


def summarize(items: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """One row per task: task, metric, value (percent, or perplexity), n, low, high, chance, errors, truncated.

    Items with an error are left out of value and n and counted in errors. Intervals: Wilson's for 0/1 scores; for
    perplexity a jackknife Student-t interval of the log-likelihood per token over the texts, exponentiated.
    """
    table = []
    for name, rows in items.groupby("task", sort=False):
        good = rows[rows["score"].notna()]
        metric = str(rows["metric"].iloc[0])
        score = good["score"].to_numpy(dtype=float)
        if metric == "perplexity":
            mean, low, high = ratio_interval(score, good["weight"].to_numpy(dtype=float), confidence)
            value, low, high = (math.exp(min(x, 700.0)) for x in (mean, low, high))
        else:
            value, low, high = (100.0 * x for x in mean_interval(score, confidence))
        table.append(
            {
                "task": name,
                "metric": metric,
                "value": value,
                "n": len(good),
                "low": low,
                "high": high,
                "chance": float(rows["chance"].iloc[0]) if "chance" in rows else float("nan"),
                "errors": len(rows) - len(good),
                "truncated": int((rows["truncated"] > 0).sum()) if "truncated" in rows else 0,
            }
        )
    return pd.DataFrame(table)
