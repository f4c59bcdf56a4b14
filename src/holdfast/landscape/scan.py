"""Scanning a plane through the weights: ``surface`` and, over several random planes, ``surfaces``."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.errors import UserError, did_you_mean
from holdfast.landscape.cache import PointCache, weights_digest
from holdfast.landscape.checkpoints import Plane
from holdfast.landscape.directions import KINDS, Kind, Noise, Stored, cosine, products
from holdfast.landscape.grid import Array, Mark, Surface
from holdfast.landscape.objective import Data, FunctionLoss, Objective, objective_of
from holdfast.landscape.plan import Memory, Plan, plan
from holdfast.landscape.ranks import Ranks, Split
from holdfast.landscape.weights import Direction, Mover, Scope, moving

log = logging.getLogger("holdfast.landscape")
Directions = str | Plane | Sequence[Mapping[str, Tensor]]
Range = float | Sequence[float] | None
OnPoint = Callable[[int, int], None]


@dataclass
class Clock:
    """Seconds spent moving weights, and in forwards."""

    moving: float = 0.0
    loss: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def as_dict(self) -> dict[str, float]:
        """For a surface's meta data."""
        return {"total": time.perf_counter() - self.start, "moving": self.moving, "loss": self.loss}


def surface(
    model: nn.Module,
    data: Data,
    *,
    tokenizer: Any = None,
    grid: int = 21,
    range: Range = None,
    directions: Directions = "filter",
    seed: int = 0,
    scope: Scope = "trainable",
    compute: str = "float32",
    memory: Memory = "auto",
    split: Split = "auto",
    cache: str | Path | None = None,
    on_point: OnPoint | None = None,
    **subset: Any,
) -> Surface:
    """Losses f(α, β) = L(θ + αδ₁ + βδ₂) on a ``grid`` x ``grid`` square (2406.04836, 2.1; 1712.09913).

    ``data``: a function of the model, batches, or examples with a ``tokenizer`` (``subset``: see ``token_loss``).
    ``directions``: "gaussian" (N(0, 1) per element, as in the paper), "filter" (rows scaled to the rows of θ),
    a ``Plane`` through checkpoints, or two mappings of parameter name to tensor. ``range``: α and β run from
    −range to range (default 1; a plane's own extent for a ``Plane``), or (α from, α to, β from, β to).
    ``memory``: directions "stored" (3 extra copies of the weights, in all), "regenerated" (1), or as the plan finds.
    Cost: grid² forwards over the subset. With ``cache`` every finished point is kept there and not done again.
    In a torch.distributed job the points (sharded weights: the batches) are split over the ranks; every rank
    returns the same surface. The weights are put back bit for bit however the scan ends.

    Raises UserError for an even grid (no centre), unknown directions or data that has no supervised token.
    """
    objective = objective_of(data, tokenizer, compute=compute, **subset)
    alphas, betas = axes(grid, range, directions)
    clock = Clock()
    with moving(model, scope) as mover, torch.no_grad():
        ranks = Ranks.of(mover.model, split)
        pair, names, how = _directions(mover, ranks, directions, seed, memory)
        points = [(a, b) for a in alphas.tolist() for b in betas.tolist()]
        key = _key(mover, ranks, objective, names, points) if cache is not None else {}
        with PointCache(cache, key, ranks) as kept:
            losses = _scan(mover, pair, objective, ranks, points, kept, clock, on_point)
        found = losses.get(points.index((0.0, 0.0))) if (0.0, 0.0) in points else None
        centre = _loss_at(mover, pair, (0.0, 0.0), objective, ranks, clock) if found is None else found
        geometry = _geometry(products(mover, pair), alphas, betas)
        roundoff = max(torch.finfo(cell.view.dtype).eps for cell in mover.cells)
    meta = how | geometry | {
        "scope": scope, "compute": getattr(objective, "compute", ""), "split": ranks.split, "ranks": ranks.world,
        "tokens": getattr(objective, "tokens", None), "data": objective.fingerprint()[:16],
        "parameters": sum(cell.count for cell in mover.cells), "torch": torch.__version__,
        "seconds": clock.as_dict(), "warnings": _warnings(geometry, roundoff),
    }  # fmt: skip
    marks = directions.marks if isinstance(directions, Plane) else (Mark("θ", ((0.0, 0.0),)),)
    values = np.array([losses[i] for i, _ in enumerate(points)], dtype=np.float64)
    return Surface(values.reshape(len(alphas), len(betas)), alphas, betas, centre, meta, tuple(marks))


def surfaces(model: nn.Module, data: Data, *, seeds: Iterable[int] = (0, 1, 2), **settings: Any) -> list[Surface]:
    """One surface per direction seed: one random plane is an anecdote. ``settings``: as ``surface``.

    The data is drawn and tokenized once. Condense the result with ``summarize``.
    """
    tokenizer, compute = settings.pop("tokenizer", None), settings.pop("compute", "float32")
    known = set(surface.__annotations__)
    subset = {name: settings.pop(name) for name in list(settings) if name not in known}
    objective = objective_of(data, tokenizer, compute=compute, **subset)
    return [surface(model, objective, seed=seed, compute=compute, **settings) for seed in seeds]


def axes(grid: int, extent: Range, directions: Directions) -> tuple[Array, Array]:
    """The α and β values of a grid; the middle is exactly 0 on a symmetric one."""
    if grid < 3:
        raise UserError(f"grid must be at least 3, not {grid}")
    if extent is None:
        extent = directions.extent() if isinstance(directions, Plane) else 1.0
    if isinstance(extent, (int, float)):
        if not (math.isfinite(extent) and extent > 0):
            raise UserError(f"range must be positive, not {extent}")
        if grid % 2 == 0:
            raise UserError(f"grid must be odd, so that its centre is the model itself; not {grid}")
        half = np.arange(1, grid // 2 + 1) * (float(extent) / (grid // 2))
        axis = np.concatenate([-half[::-1], [0.0], half])
        return axis, axis.copy()
    values = [float(value) for value in extent]
    if len(values) != 4 or not (values[0] < values[1] and values[2] < values[3]):
        raise UserError(f"range must be one number, or α from, α to, β from, β to; not {list(extent)}")
    return np.linspace(values[0], values[1], grid), np.linspace(values[2], values[3], grid)


def _directions(
    mover: Mover, ranks: Ranks, directions: Directions, seed: int, memory: Memory
) -> tuple[list[Direction], list[str], dict[str, Any]]:
    """The two directions, ready to be read; a name of each for the cache; and how they were made."""
    if isinstance(directions, Plane):
        how: dict[str, Any] = {"directions": directions.kind, "explained": list(directions.explained)}
        fixed = list(directions.directions)
        return list(fixed), _digests(fixed, ranks), how | {"plan": plan(mover.cells, "stored").as_dict()}
    if not isinstance(directions, str):
        given = list(directions)
        if len(given) != 2:
            raise UserError(f"a surface needs two directions, not {len(given)}")
        pair = [Stored.from_tensors(tensors, mover) for tensors in given]
        how = {"directions": "given", "plan": plan(mover.cells, "stored").as_dict()}
        return list(pair), _digests(pair, ranks), how
    if directions not in KINDS:
        raise UserError(f"unknown directions '{directions}'.{did_you_mean(directions, KINDS)}")
    made: Plan = plan(mover.cells, memory)
    noises = [Noise(seed, number, cast(Kind, directions)) for number in (0, 1)]
    for noise in noises:
        noise.prepare(mover)
    ready: list[Direction] = [Stored.of(n, mover) for n in noises] if made.memory == "stored" else list(noises)
    names = [f"{directions}/{seed}/{noise.number}" for noise in noises]  # the same bits, stored or not
    return ready, names, {"directions": directions, "seed": seed, "plan": made.as_dict()}


def _scan(
    mover: Mover, pair: Sequence[Direction], objective: Objective, ranks: Ranks, points: list[tuple[float, float]],
    kept: PointCache, clock: Clock, on_point: OnPoint | None,
) -> dict[int, float]:  # fmt: skip
    """The loss at every point; the centre first, so that a mistake in the data shows at once."""
    losses = kept.known()
    if losses:
        log.info("%d of %d points were finished before", len(losses), len(points))
    order = sorted((i for i, _ in enumerate(points)), key=lambda i: (points[i] != (0.0, 0.0), i))
    mine = ranks.points(order)
    for done, index in enumerate(mine, start=1):
        if index not in losses:
            losses[index] = _loss_at(mover, pair, points[index], objective, ranks, clock)
            kept.add(index, losses[index])
        if on_point is not None:
            on_point(done, len(mine))
    return ranks.union(losses)


def _loss_at(
    mover: Mover, pair: Sequence[Direction], point: Sequence[float], objective: Objective, ranks: Ranks, clock: Clock
) -> float:
    start = time.perf_counter()
    mover.move(zip(point, pair, strict=True))
    moved = time.perf_counter()
    loss = ranks.loss(objective, mover.model)
    clock.moving += moved - start
    clock.loss += time.perf_counter() - moved
    return loss


def _key(
    mover: Mover, ranks: Ranks, objective: Objective, names: list[str], points: list[tuple[float, float]]
) -> dict[str, Any]:
    """Everything that decides the losses of a scan. Raises UserError for a function without a name."""
    data = objective.fingerprint()
    if not data:
        raise UserError("a cache needs to know what is measured: pass FunctionLoss(function, name='…') as data")
    return {
        "weights": weights_digest(mover, ranks),
        "directions": names,
        "data": data,
        "points": points,
        "torch": torch.__version__,
        "device": mover.cells[0].view.device.type,
    }


def _digests(directions: Sequence[Stored], ranks: Ranks) -> list[str]:
    """Names of stored directions by their content."""
    names = []
    for direction in directions:
        whole = hashlib.sha256()
        for name, part in direction.parts.items():
            whole.update(name.encode())
            whole.update(part.cpu().numpy().tobytes())
        names.append(str(ranks.agree(whole.hexdigest()) if ranks.split == "data" else whole.hexdigest()))
    return names


def _geometry(table: list[list[float]], alphas: Array, betas: Array) -> dict[str, Any]:
    """Norms, angle, and how far the rim moves the weights relative to their own norm."""
    norms = [math.sqrt(table[0][0]), math.sqrt(table[1][1])]
    weights = math.sqrt(table[2][2])
    reach = max(norms[0] * float(np.abs(alphas).max()), norms[1] * float(np.abs(betas).max()))
    return {
        "norms": norms, "cosine": cosine(table), "weights_norm": weights,
        "reach": reach / weights if weights else math.inf,
    }  # fmt: skip


def _warnings(geometry: dict[str, Any], roundoff: float) -> list[str]:
    if roundoff > 1e-4:
        return [
            "the weights are stored in a type of less than 24 bits: moves below its resolution are lost; "
            "load the model in float32 and use compute='bfloat16'"
        ]
    return ["the rim moves the weights by more than twice their own norm"] if geometry["reach"] > 2 else []


__all__ = ["FunctionLoss", "Surface", "axes", "surface", "surfaces"]
