"""Loss surfaces, flatness and sharpness: ``surface`` scans a plane, ``flatness`` condenses it.

Nothing here imports torch until it is used.
"""

from __future__ import annotations

from typing import Any

from holdfast.lazy import lazily

# public name -> module that defines it
_PUBLIC = {
    "flatness": "flat",
    "Flatness": "flat",
    "surface": "scan",
    "surfaces": "scan",
    "Surface": "grid",
    "summarize": "seeds",
    "Spread": "seeds",
    "line": "lines",
    "Line": "lines",
    "token_loss": "objective",
    "TokenLoss": "objective",
    "FunctionLoss": "objective",
    "evaluation_loss": "objective",
    "Noise": "directions",
    "Stored": "directions",
    "noise_tensors": "directions",
    "plane": "checkpoints",
    "Plane": "checkpoints",
    "pca": "checkpoints",
    "project": "checkpoints",
    "sharpness": "ball",
    "Sharpness": "ball",
    "curvature": "hessian",
    "Curvature": "hessian",
    "contour": "pictures",
    "relief": "pictures",
    "save_picture": "pictures",
    "svg": "draw",
    "rank_correlation": "claim",
    "Correlation": "claim",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    return lazily(__name__, _PUBLIC, name)


def __dir__() -> list[str]:
    return sorted(__all__)
