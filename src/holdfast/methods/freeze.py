"""Freeze: weights that must not move."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from holdfast.errors import UserError
from holdfast.method import Grad, Method
from holdfast.tensors import Params

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)\.")


@dataclass
class Freeze(Method):
    """No update for the bottom layers, the embeddings, or whatever a regex names.

    g ← none for frozen parameters, so that the optimizer (weight decay included) leaves them alone bit for bit
    (arXiv 2501.13453 freezes embeddings and bottom layers).

    ``layers``: the number of bottom layers; ``embeddings``: input embeddings (and what is tied to them); ``pattern``:
    regex on parameter names. Put it first in the list, then an outer SAM neither measures nor perturbs what is frozen.
    Cost: none, and no saving either: gradients are computed and dropped, which works the same on every engine. To save
    compute set ``requires_grad_(False)`` on the model before training. UserError if a part names nothing.
    """

    layers: int = 0
    embeddings: bool = False
    pattern: str | None = None

    name: ClassVar[str] = "freeze"

    def __post_init__(self) -> None:
        self.require(self.layers >= 0, "layers", "at least 0")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise UserError(f"freeze: pattern '{self.pattern}' is no regular expression: {error}.") from error

    def frozen(self, params: Params) -> list[str]:
        """Names of the parameters that will not move."""
        chosen: dict[str, list[str]] = {}
        if self.layers:
            found = {name: LAYER.search(name) for name in params}
            bottom = [name for name, match in found.items() if match and int(match.group(1)) < self.layers]
            chosen[f"layers={self.layers}"] = bottom
        if self.embeddings:
            chosen["embeddings=true"] = [name for name in params if re.search(r"embed|wte\.|wpe\.", name)]
        if self.pattern:
            chosen[f"pattern '{self.pattern}'"] = [name for name in params if re.search(self.pattern, name)]
        for what, names in chosen.items():
            if not names:
                raise UserError(f"freeze: {what} names none of the trainable parameters, e.g. '{next(iter(params))}'.")
        return sorted({name for names in chosen.values() for name in names})

    def gradient(self, grad: Grad, params: Params) -> Grad:
        return functools.partial(self._without, grad, [params[name] for name in self.frozen(params)])

    def _without(self, grad: Grad, frozen: list[Tensor]) -> Tensor | None:
        loss = grad()
        for param in frozen:
            param.grad = None
        return loss
