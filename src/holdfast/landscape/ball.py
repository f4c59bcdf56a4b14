"""Sharpness without a plane: how far the loss rises in a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import UserError
from holdfast.landscape.directions import Noise, Stored, products
from holdfast.landscape.gradients import gradient, sum_over_ranks
from holdfast.landscape.objective import Data, Objective, objective_of
from holdfast.landscape.ranks import Ranks, Split
from holdfast.landscape.seeds import Spread
from holdfast.landscape.weights import Mover, Scope, moving


@dataclass(frozen=True)
class Sharpness:
    """Loss rises at L2 distance ``rho`` from θ, in nats per token.

    ``worst``: L(θ + ε) − L(θ) at the ε that ascent finds, a lower bound of the true maximum; ``average``: over
    random ε of norm rho, one value per direction (the mean of +ε and −ε, which cancels the gradient's part).
    ``gradient_norm`` is ‖∇L(θ)‖₂; ``relative_rho`` is rho / ‖θ‖₂.
    """

    rho: float
    centre: float
    worst: float
    average: Spread
    gradient_norm: float
    relative_rho: float
    steps: int
    meta: dict[str, Any] = field(default_factory=dict)


def sharpness(
    model: nn.Module,
    data: Data,
    *,
    rho: float = 0.05,
    steps: int = 1,
    directions: int = 8,
    seed: int = 0,
    tokenizer: Any = None,
    scope: Scope = "trainable",
    compute: str = "float32",
    split: Split = "auto",
    **subset: Any,
) -> Sharpness:
    """Worst-case and average loss rise at radius ``rho``: the gap that SAM minimises (2010.01412, 2).

    ``steps`` = 1: ε = rho·g/‖g‖₂, SAM's own ascent, on the gradient of the whole subset. More steps: projected
    ascent, each gradient normalised and the result scaled back to the sphere; the best step counts. Average: over
    ``directions`` uniform directions on the sphere, both signs; for a small rho it is rho²/(2n)·trace of the Hessian
    of n weights. Cost: steps gradients and steps + 2·directions + 1 forwards over the subset, 2 extra copies of
    the weights and one gradient.

    Raises UserError for a rho, steps or directions that isn't positive.
    """
    if not (math.isfinite(rho) and rho > 0) or steps < 1 or directions < 1:
        raise UserError("sharpness needs rho > 0, steps >= 1 and directions >= 1")
    objective = objective_of(data, tokenizer, compute=compute, **subset)
    with moving(model, scope) as mover:
        ranks = Ranks.of(mover.model, "data" if split in ("auto", "points") else split)
        centre = _loss(mover, objective, ranks)
        worst, norm = _ascend(mover, objective, ranks, rho, steps, centre)
        rises = [_average(mover, objective, ranks, rho, Noise(seed, number)) - centre for number in range(directions)]
        mover.restore()
        home = math.sqrt(products(mover, [])[0][0])
    return Sharpness(
        rho=rho,
        centre=centre,
        worst=worst - centre,
        average=Spread(tuple(rises)),
        gradient_norm=norm,
        relative_rho=rho / home if home else math.inf,
        steps=steps,
        meta={"seed": seed, "scope": scope, "compute": compute, "tokens": getattr(objective, "tokens", None)},
    )


@torch.no_grad()
def _loss(mover: Mover, objective: Objective, ranks: Ranks) -> float:
    return ranks.loss(objective, mover.model)


def _ascend(
    mover: Mover, objective: Objective, ranks: Ranks, rho: float, steps: int, centre: float
) -> tuple[float, float]:
    """Highest loss that ascent on the sphere meets, and the norm of the gradient at θ."""
    offset: list[Tensor] | None = None
    best, first_norm = centre, 0.0
    for step in range(steps):
        found = gradient(mover, objective, ranks)
        norm = _norm(mover, found)
        first_norm = norm if step == 0 else first_norm
        if not (math.isfinite(norm) and norm > 0):
            break
        if offset is None:
            offset = [g.mul_(rho / norm) for g in found]
        else:
            for part, g in zip(offset, found, strict=True):
                part.add_(g, alpha=rho / norm)
            length = _norm(mover, offset)
            offset = [part.mul_(rho / length) for part in offset]
        mover.move([(1.0, Stored({cell.name: part for cell, part in zip(mover.cells, offset, strict=True)}))])
        best = max(best, _loss(mover, objective, ranks))
    mover.restore()
    return best, first_norm


@torch.no_grad()
def _average(mover: Mover, objective: Objective, ranks: Ranks, rho: float, noise: Noise) -> float:
    """Mean loss at θ ± rho·δ/‖δ‖."""
    scale = rho / math.sqrt(products(mover, [noise])[0][0])
    total = 0.0
    for sign in (1.0, -1.0):
        mover.move([(sign * scale, noise)])
        total += _loss(mover, objective, ranks)
    return total / 2


def _norm(mover: Mover, parts: Sequence[Tensor]) -> float:
    """L2 norm over all weights and, for shards, all ranks; the squares are added in float64."""
    square = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in parts]).sum()
    return math.sqrt(float(sum_over_ranks(mover, square)))
