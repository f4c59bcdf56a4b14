"""Is the knowledge gone, or has only its format shifted? Restoring, decomposition, timeline (paper 2).

The names are imported on first use: ``decompose`` needs numpy alone.
"""

from __future__ import annotations

from typing import Any

from holdfast.lazy import lazily

_PUBLIC = {
    "Decomposition": "decomposition",
    "Interval": "bootstrap",
    "decompose": "decomposition",
    "Request": "request",
    "RestoreSettings": "restoring",
    "decompose_benchmarks": "decomposition",
    "decompose_samples": "samples",
    "diagnose": "diagnosis",
    "overlap": "contamination",
    "read_passages": "corpus",
    "restore": "restoring",
    "write_page": "page",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    return lazily(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return __all__
