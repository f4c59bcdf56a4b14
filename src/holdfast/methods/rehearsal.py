"""Methods that change what a task trains on: a share of past tasks' data."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from holdfast.errors import UserError
from holdfast.method import Method


@dataclass
class Rehearsal(Method):
    """Mix past tasks' examples into the training set.

    ``share`` of the final set is past data, drawn evenly from all past tasks without replacement (a task too small for
    its part gives the rest to the others) and shuffled in; the Trainer reshuffles it every epoch. ``replace`` keeps the
    number of examples, ``add`` keeps all of the task's own. Too little past data is reported, never repeated.
    (Robins 1995; arXiv 2501.05559 section 5.2 uses 5 % and 10 %.)
    Cost: past data on disk; no extra gradient with ``replace``, 1/(1−share) times the steps with ``add``.
    """

    share: float = 0.1
    mode: Literal["replace", "add"] = "replace"

    name: ClassVar[str] = "rehearsal"
    symbols: ClassVar[Mapping[str, str]] = {"share": "share"}

    def __post_init__(self) -> None:
        self.require(0 <= self.share < 1, "share", "in [0, 1)")
        self.require(self.mode in ("replace", "add"), "mode", "'replace' or 'add'")
        self.drawn: dict[str, int] = {}
        self.shortfall = 0

    def data(self, task: Any, memory: Mapping[str, Any]) -> Any:
        self.drawn, self.shortfall = {}, 0
        if self.share == 0 or not memory:
            return task
        rng = random.Random(getattr(memory, "seed", 0))
        size = _length(task, "the training set")
        wanted = past_examples(size, self.share, self.mode)
        available = {name: _length(past, f"past task '{name}'") for name, past in memory.items()}
        self.drawn = evenly(wanted, available)
        found = sum(self.drawn.values())
        self.shortfall = wanted - found
        if self.shortfall:
            warnings.warn(
                f"rehearsal: share={self.share} wants {wanted} past examples, only {found} exist; none is repeated.",
                stacklevel=2,
            )
        own = size - found if self.mode == "replace" else size
        parts = [take(task, sorted(rng.sample(range(size), own)))] if own < size else [task]
        parts += [take(memory[name], rng.sample(range(available[name]), n)) for name, n in self.drawn.items() if n]
        joined = join(parts)
        order = list(range(len(joined)))
        rng.shuffle(order)
        return take(joined, order)


def past_examples(size: int, share: float, mode: str) -> int:
    """How many past examples make ``share`` of the final training set of a task with ``size`` examples."""
    return round(size * share) if mode == "replace" else round(size * share / (1 - share))


def evenly(wanted: int, available: Mapping[str, int]) -> dict[str, int]:
    """Split a number over tasks as evenly as their sizes allow; what is left over goes to the most recent tasks."""
    drawn = dict.fromkeys(available, 0)
    left = min(wanted, sum(available.values()))
    while left:
        open_ = [name for name in available if drawn[name] < available[name]]
        each, rest = divmod(left, len(open_))
        quota = {name: each + (position >= len(open_) - rest) for position, name in enumerate(open_)}
        for name in open_:
            part = min(quota[name], available[name] - drawn[name])
            drawn[name] += part
            left -= part
    return drawn


def _length(data: Any, what: str) -> int:
    try:
        return len(data)
    except TypeError as error:
        raise UserError(
            f"rehearsal needs data of known length; {what} is a stream. Load it without streaming."
        ) from error


def take(data: Any, indices: Sequence[int]) -> Any:
    """Rows of a ``datasets.Dataset`` or of any map-style dataset."""
    if hasattr(data, "select"):
        return data.select(indices)
    from torch.utils.data import Subset

    return Subset(data, list(indices))


def join(parts: Sequence[Any]) -> Any:
    """Concatenate datasets; UserError if their columns differ (they would be trained on as empty)."""
    if all(hasattr(part, "column_names") for part in parts):
        from datasets import concatenate_datasets

        columns = [sorted(part.column_names) for part in parts]
        for other in columns[1:]:
            if other != columns[0]:
                raise UserError(f"Past data has the columns {other}, the task has {columns[0]}; they must be the same.")
        return concatenate_datasets(list(parts))
    from torch.utils.data import ConcatDataset

    return ConcatDataset(parts)
