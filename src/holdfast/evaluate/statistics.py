"""Statistics on per-item outcomes: intervals of one checkpoint, paired tests between two, ranges over seeds."""

from __future__ import annotations

from holdfast.evaluate.intervals import Estimate, McNemar, SeedRange, mean_interval, ratio_interval, wilson
from holdfast.evaluate.paired import (
    drop_bounds,
    holm,
    items_needed,
    mcnemar,
    minimum_detectable_drop,
    paired_bootstrap,
    paired_interval,
    power,
    seed_range,
)

__all__ = [
    "Estimate",
    "McNemar",
    "SeedRange",
    "drop_bounds",
    "holm",
    "items_needed",
    "mcnemar",
    "mean_interval",
    "minimum_detectable_drop",
    "paired_bootstrap",
    "paired_interval",
    "power",
    "ratio_interval",
    "seed_range",
    "wilson",
]
