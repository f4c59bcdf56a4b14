"""Gradients of the mean loss of the whole subset, on this rank's part of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.landscape.objective import Objective
from holdfast.landscape.ranks import Ranks
from holdfast.landscape.weights import Mover, is_sharded, reshard


def gradient(mover: Mover, objective: Objective, ranks: Ranks) -> list[Tensor]:
    """∇L over the moved weights as flat tensors in the type of the sums; the same on every rank but for shards.

    The parameters' own ``.grad`` is left as it was. Cost: one forward and backward over the subset.
    """
    reshard(mover.model)  # else the root's parameters are the gathered ones, and those get no gradient
    parameters = _parameters(mover)
    parts = list(range(objective.parts))
    mine = parts[ranks.rank :: ranks.world] if ranks.split == "data" and len(parts) > 1 else parts
    # FSDP communicates in every backward: all ranks make the same number of them
    passes = -(-len(parts) // ranks.world) if ranks.split == "data" and len(parts) > 1 else len(parts)
    weight = 0.0
    with gradients_aside(mover.model, parameters), torch.enable_grad():
        for index in range(passes):
            counted = index < len(mine)
            value, count = objective.sums(mover.model, mine[index] if counted else 0)
            (value if counted else value * 0.0).backward()
            weight += count if counted else 0.0
        found = [_flat(parameter, cell.work_dtype) for parameter, cell in zip(parameters, mover.cells, strict=True)]
    return _mean(mover, ranks, objective, found, weight)


def _mean(mover: Mover, ranks: Ranks, objective: Objective, found: list[Tensor], weight: float) -> list[Tensor]:
    shared = ranks.split == "data" and objective.parts > 1
    total = sum(ranks.agree(weight)) if shared else weight
    sharded = any(is_sharded(parameter) for parameter in _parameters(mover))
    for part in found:
        if sharded:
            part.mul_(ranks.world / total if shared else 1.0 / total)  # FSDP2 has averaged over the ranks
        else:
            if shared:
                dist.all_reduce(part)
            part.div_(total)
    return found


def _flat(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    grad = parameter.grad
    if grad is None:
        local = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
        return torch.zeros_like(local, dtype=dtype).view(-1)
    local = grad.to_local() if is_sharded(grad) else grad  # type: ignore[attr-defined]
    return local.detach().reshape(-1).to(dtype)


def _parameters(mover: Mover) -> list[nn.Parameter]:
    named = dict(mover.model.named_parameters())
    return [named[cell.name] for cell in mover.cells]


@contextmanager
def gradients_aside(model: nn.Module, needed: list[nn.Parameter]) -> Iterator[None]:
    """Inside, ``.grad`` is empty and exactly ``needed`` require gradients; afterwards all is as it was."""
    wanted = {id(parameter) for parameter in needed}
    before = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, grad, requires in before:
            parameter.grad = None
            parameter.requires_grad_(requires)
            parameter.grad = grad


def sum_over_ranks(mover: Mover, value: Tensor) -> Tensor:
    """A sum over this rank's weights, completed over the ranks that hold the other shards."""
    if any(is_sharded(parameter) for parameter in _parameters(mover)):
        value = value.clone()
        dist.all_reduce(value)
    return value
