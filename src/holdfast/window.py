"""The window of one optimizer step, replayable: the same micro-batches with the same random numbers."""

from __future__ import annotations

import copy
import functools
import random
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from holdfast.tensors import Params

LARGEST = 10_000  # entries of a counter that is still copied before a replay


@dataclass
class Window:
    """Micro-batches of one optimizer step on this rank, and what their first pass left."""

    batches: list[Any]
    seen: int = 0  # micro-batches the Trainer has handed out
    before: list[Any] = field(default_factory=list)  # random state before each micro-batch of the first pass
    losses: list[Tensor] = field(default_factory=list)  # of the first pass

    @property
    def complete(self) -> bool:
        return self.seen >= len(self.batches)


class WindowGradient:
    """The innermost ``grad``: leaves the gradient of the window's mean loss in ``p.grad`` and returns that loss.

    The first pass over a micro-batch is the one that is recorded; every further pass is a replay with the same random
    numbers, after which the random state is what it was before the replay.
    """

    def __init__(
        self,
        params: Params,
        device: torch.device,
        run: Callable[[Any, bool], Tensor],
        mean_over_ranks: Callable[[Tensor], Tensor],
        unrecorded: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._params, self._device = params, device
        self._run, self._mean_over_ranks, self._unrecorded = run, mean_over_ranks, unrecorded
        self.window = Window([])

    def __call__(self) -> Tensor:
        drop_gradients(self._params)
        last = len(self.window.batches) - 1
        losses = [self._pass(index, index == last) for index in range(last + 1)]
        return self._mean_over_ranks(torch.stack(losses).sum())

    def parts(self) -> list[Callable[[], Tensor]]:
        """One ``grad`` per micro-batch (over all ranks); they add up to the window's."""
        return [functools.partial(self._part, index) for index in range(len(self.window.batches))]

    def _part(self, index: int) -> Tensor:
        drop_gradients(self._params)
        return self._mean_over_ranks(self._pass(index, True))

    def _pass(self, index: int, exchange: bool) -> Tensor:
        """Forward and backward of one micro-batch; ``exchange``: ranks add up their gradients now."""
        window = self.window
        if index == len(window.losses):
            window.before.append(rng_state(self._device))
            window.losses.append(self._run(window.batches[index], exchange))
            return window.losses[-1]
        now = rng_state(self._device)
        set_rng_state(window.before[index], self._device)
        with self._unrecorded():
            loss = self._run(window.batches[index], exchange)
        set_rng_state(now, self._device)
        return loss


def rng_state(device: torch.device) -> tuple[Any, ...]:
    """Random state of Python, NumPy, torch on the CPU and on the accelerator."""
    accelerator = None
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        accelerator = module.get_rng_state() if hasattr(module, "get_rng_state") else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), accelerator


def set_rng_state(state: tuple[Any, ...], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    random.setstate(state[0])
    numpy.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.get_device_module(device.type).set_rng_state(state[3])


def counters(owner: object) -> dict[str, Any]:
    """Copies of the attributes that only count: numbers, and dicts, lists and deques of numbers.

    A replay calls the Trainer's ``compute_loss`` again, which may count tokens and collect metrics (TRL's
    ``_metrics``, a user's own list of losses); putting these copies back afterwards records the first pass only.
    """
    return {name: copy.deepcopy(value) for name, value in vars(owner).items() if _counts(value)[0]}


def restore_counters(owner: object, saved: Mapping[str, Any]) -> None:
    """Undo what a replay counted; an attribute that holds the same object keeps it, with its old content."""
    for name, value in saved.items():
        current = getattr(owner, name, None)
        if isinstance(current, dict) and isinstance(value, dict):
            current.clear()
            current.update(value)
        elif isinstance(current, list) and isinstance(value, list):
            current[:] = value
        else:
            setattr(owner, name, value)


def _counts(value: Any, room: int = LARGEST) -> tuple[bool, int]:
    if value is None or isinstance(value, (bool, int, float, str)):
        return True, room - 1
    if isinstance(value, Tensor):
        return value.dim() == 0, room - 1
    if isinstance(value, dict):
        items: list[Any] = list(value.values())
    elif isinstance(value, (list, deque)):
        items = list(value)
    else:
        return False, room
    for item in items:
        plain, room = _counts(item, room)
        if not plain or room <= 0:
            return False, room
    return True, room


def drop_gradients(params: Params) -> None:
    """Forget the gradients, as ``zero_grad(set_to_none=True)``."""
    for param in params.values():
        param.grad = None
