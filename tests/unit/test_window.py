"""A replay of the window: the same random numbers, and none of the numbers that are drawn after it are touched."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.window import Window, WindowGradient


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def whole(gradient: WindowGradient) -> None:
    gradient()


def by_parts(gradient: WindowGradient) -> None:
    for part in gradient.parts():
        part()


@pytest.mark.parametrize("replay", [whole, by_parts])
def test_replay_repeats_the_draws_and_leaves_the_next_ones_alone(replay: Callable[[WindowGradient], None]) -> None:
    drawn: list[tuple[float, float, float]] = []

    def forward_backward(batch: Any, exchange: bool) -> torch.Tensor:
        drawn.append(draw())
        return torch.zeros(())

    gradient = WindowGradient(
        {}, torch.device("cpu"), forward_backward, lambda loss: loss, lambda: contextlib.nullcontext()
    )

    def run(replays: int) -> tuple[list[Any], tuple[float, float, float]]:
        """What each pass over the three micro-batches drew, and the draw after them; one more falls between."""
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        drawn.clear()
        gradient.window = Window([None] * 3)
        gradient()
        draw()  # a method's own, after the first pass
        for _ in range(replays):
            replay(gradient)
        return [drawn[start : start + 3] for start in range(0, len(drawn), 3)], draw()

    once, after_one = run(replays=0)
    passes, after_three = run(replays=2)
    assert passes == once * 3 and len(set(passes[0])) == 3
    assert after_three == after_one
