"""holdfast: fine-tune models without losing what they already know.

The public names are imported on first use, so that ``import holdfast`` stays cheap.
"""

from __future__ import annotations

from typing import Any

from holdfast.lazy import lazily

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "Method": "holdfast.method",
    "with_methods": "holdfast.trainer",
    "METHODS": "holdfast.methods",
    "SAM": "holdfast.methods",
    "SFA": "holdfast.methods",
    "L2": "holdfast.methods",
    "EWC": "holdfast.methods",
    "Rehearsal": "holdfast.methods",
    "Distill": "holdfast.methods",
    "EMA": "holdfast.methods",
    "Freeze": "holdfast.methods",
    "WiSEFT": "holdfast.methods",
    "FisherMerge": "holdfast.methods",
    "Study": "holdfast.study",
    "load_recipe": "holdfast.recipe",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    return lazily(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return sorted(__all__)
