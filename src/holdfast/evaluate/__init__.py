"""Panels, an lm-eval engine with shared prefixes, probes, and paired statistics on per-item outcomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.evaluate.tasks import EvalTask, Item
from holdfast.lazy import lazily

if TYPE_CHECKING:
    from holdfast.evaluate.callback import EvaluateEvery
    from holdfast.evaluate.harness import PrefixSharingLM
    from holdfast.evaluate.measuring import measure
    from holdfast.evaluate.summary import summarize

# public name -> module; heavy modules are imported on first use
_PUBLIC = {
    "measure": "holdfast.evaluate.measuring",
    "summarize": "holdfast.evaluate.summary",
    "EvaluateEvery": "holdfast.evaluate.callback",
    "PrefixSharingLM": "holdfast.evaluate.harness",
}

__all__ = ["EvalTask", "EvaluateEvery", "Item", "PrefixSharingLM", "measure", "summarize"]


def __getattr__(name: str) -> Any:
    return lazily(__name__, _PUBLIC, name)
