"""Mixing other data into a training set: how many, which ones, and in what order."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from holdfast.errors import UserError

Mode = Literal["replace", "add"]
MODES = ("replace", "add")


@dataclass(frozen=True)
class Mixture:
    """A mixed training set, and how it came about."""

    data: Any
    drawn: dict[str, int]  # examples taken from each pool
    shortfall: int  # examples that were wanted but do not exist


def wanted(size: int, share: float, mode: str) -> int:
    """How many other examples make ``share`` of the final training set of a task with ``size`` examples.

    ``replace`` keeps the set's size, ``add`` keeps all of the task's own examples.
    """
    return round(size * share) if mode == "replace" else round(size * share / (1 - share))


def split(count: int, available: Mapping[str, int], weights: Mapping[str, float] | None = None) -> dict[str, int]:
    """Split ``count`` draws over pools in proportion to weights (evenly without), as far as the pools reach.

    What a small pool can't give goes to the others; single leftover draws go to the latest pools.
    """
    share = {name: 1.0 if weights is None else float(weights.get(name, 0.0)) for name in available}
    drawn = dict.fromkeys(available, 0)
    left = min(count, sum(size for name, size in available.items() if share[name] > 0))
    while left:
        open_ = [name for name in available if drawn[name] < available[name] and share[name] > 0]
        total = sum(share[name] for name in open_)
        parts = {name: int(left * share[name] / total) for name in open_}
        if not any(parts.values()):
            parts = dict.fromkeys(open_[-left:], 1)
        for name, part in parts.items():
            taken = min(part, available[name] - drawn[name])
            drawn[name] += taken
            left -= taken
    return drawn


def mix(
    task: Any,
    pools: Mapping[str, Any],
    share: float,
    mode: str,
    seed: int,
    method: str,
    weights: Mapping[str, float] | None = None,
) -> Mixture:
    """``task`` with ``share`` of the final set drawn from ``pools`` without replacement, shuffled by ``seed``."""
    rng = random.Random(seed)
    size = length(task, method, "the training set")
    available = {name: length(pool, method, f"'{name}'") for name, pool in pools.items()}
    count = wanted(size, share, mode)
    drawn = split(count, available, weights)
    found = sum(drawn.values())
    if found < count:
        warnings.warn(
            f"{method}: share={share} of the training set is {count} examples, only {found} exist; none is repeated.",
            stacklevel=3,
        )
    own = size - found if mode == "replace" else size
    parts = [task if own == size else take(task, sorted(rng.sample(range(size), own)))]
    parts += [take(pools[name], rng.sample(range(available[name]), n)) for name, n in drawn.items() if n]
    joined = join(parts, method)
    order = list(range(own + found))
    rng.shuffle(order)
    return Mixture(take(joined, order), drawn, count - found)


def reservoir(pools: Mapping[str, Any], budget: int, seed: int, method: str) -> dict[str, list[int]]:
    """Rows of each pool that a memory of ``budget`` examples holds after seeing the pools in order.

    Algorithm R (Vitter 1985): every example seen so far is kept with the same probability, and what is kept after k
    pools does not depend on later ones.
    """
    rng = random.Random(seed)
    kept: list[tuple[str, int]] = []
    seen = 0
    for name, pool in pools.items():
        for row in range(length(pool, method, f"'{name}'")):
            seen += 1
            if len(kept) < budget:
                kept.append((name, row))
            elif (place := rng.randrange(seen)) < budget:
                kept[place] = (name, row)
    return {name: sorted(row for owner, row in kept if owner == name) for name in pools}


def length(data: Any, method: str, what: str) -> int:
    """Number of examples; UserError for a stream."""
    try:
        return len(data)
    except TypeError as error:
        raise UserError(
            f"{method} needs data of known length; {what} is a stream. Load it without streaming."
        ) from error


def take(data: Any, indices: Sequence[int]) -> Any:
    """Rows of a ``datasets.Dataset`` or of any map-style dataset."""
    if hasattr(data, "select"):
        return data.select(indices)
    from torch.utils.data import Subset

    return Subset(data, list(indices))


def join(parts: Sequence[Any], method: str) -> Any:
    """Concatenate datasets; UserError if their columns differ (the missing ones would be trained on as empty)."""
    if len(parts) == 1:
        return parts[0]
    if all(hasattr(part, "column_names") for part in parts):
        from datasets import concatenate_datasets

        columns = [sorted(part.column_names) for part in parts]
        for other in columns[1:]:
            if other != columns[0]:
                raise UserError(f"{method}: data with the columns {other} can't be mixed into {columns[0]}.")
        return concatenate_datasets(list(parts))
    from torch.utils.data import ConcatDataset

    return ConcatDataset(parts)
