"""Checkpoint merging: pure functions of tensors, and the same formulas streamed over checkpoints.

Nothing here imports torch until a torch tensor is asked for.
"""

from __future__ import annotations

from typing import Any

from holdfast.lazy import lazily

_PUBLIC = {
    "linear": "functions",
    "wise_ft": "functions",
    "task_arithmetic": "functions",
    "negation": "functions",
    "ties": "functions",
    "dare": "functions",
    "magnitude_prune": "functions",
    "slerp": "functions",
    "fisher": "functions",
    "StateDict": "statedict",
    "open_checkpoint": "sources",
    "METHODS": "families",
    "merge_checkpoints": "checkpoints",
    "MergeResult": "checkpoints",
    "compute_fisher": "fisher_file",
    "save_fisher": "fisher_file",
    "evaluate_sweep": "pareto",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    return lazily(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return list(__all__)
