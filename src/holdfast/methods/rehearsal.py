"""Rehearsal: a share of past tasks' data in what a task trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from holdfast.errors import UserError, did_you_mean
from holdfast.method import Method
from holdfast.methods.mixing import MODES, Mode, mix, reservoir, take


@dataclass
class Rehearsal(Method):
    """Mix past tasks' examples into the training set (Robins 1995; arXiv 2501.05559, section 5.2, uses 5 % and 10 %).

    ``share`` of the final set is past data, drawn evenly from all past tasks without replacement (a task too small for
    its part leaves the rest to the others) and shuffled in by the run's seed; the Trainer reshuffles every epoch.

    - ``mode``: ``replace`` keeps the number of examples and steps, ``add`` keeps all of the task's own examples.
    - ``weights_by_task``: how the share is divided, by past task's name; a task that is not named gets nothing.
    - ``budget``: only this many past examples are remembered in all, a reservoir over the past tasks in their order.

    Too little past data is reported (a warning, and ``shortfall``), never repeated. Cost: the past data on disk; no
    extra gradient with ``replace``, 1/(1−share) times the steps with ``add``.
    """

    share: float = 0.1
    mode: Mode = "replace"
    weights_by_task: dict[str, float] | None = None
    budget: int | None = None

    name: ClassVar[str] = "rehearsal"
    needs_past: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {"share": "share"}

    def __post_init__(self) -> None:
        self.require(0 <= self.share < 1, "share", "in [0, 1)")
        self.require(self.mode in MODES, "mode", "'replace' or 'add'")
        self.require(self.budget is None or self.budget >= 1, "budget", "at least 1")
        given = list((self.weights_by_task or {}).values())
        numbers = all(isinstance(value, (int, float)) and value >= 0 for value in given)
        self.require(not given or (numbers and sum(given) > 0), "weights_by_task", "numbers of at least 0, one above 0")
        self.drawn: dict[str, int] = {}
        self.shortfall = 0

    def data(self, task: Any, memory: Mapping[str, Any]) -> Any:
        self.drawn, self.shortfall = {}, 0
        if self.share == 0 or not memory:
            return task
        for name in self.weights_by_task or {}:
            if name not in memory:
                raise UserError(f"rehearsal: weights_by_task names '{name}'.{did_you_mean(name, memory)}")
        seed = int(getattr(memory, "seed", 0))
        pools: Mapping[str, Any] = memory
        if self.budget is not None:
            kept = reservoir(memory, self.budget, seed, self.name)
            pools = {name: take(memory[name], rows) for name, rows in kept.items() if rows}
        mixture = mix(task, pools, self.share, self.mode, seed, self.name, self.weights_by_task)
        self.drawn, self.shortfall = mixture.drawn, mixture.shortfall
        return mixture.data
