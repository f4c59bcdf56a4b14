"""Perturbations of weights: which weights move, in which direction, and what rounding leaves of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.errors import UserError
from holdfast.tensors import Params, as_dtensor, clean, dot, local, locals_, norm, shard_like, sum_over_shards

LOW_PRECISION = (torch.bfloat16, torch.float16)


def scoped(params: Params, scope: str, model: nn.Module | None) -> dict[str, nn.Parameter]:
    """The parameters a scope names: ``all``, ``norm`` (normalisation layers), ``type:Linear`` or a regex on names."""
    if scope == "all":
        return dict(params)
    if scope == "norm" or scope.startswith("type:"):
        if model is None:
            raise UserError(f"scope '{scope}' needs the model; a regex on parameter names does not.")
        wanted = scope.removeprefix("type:").lower()
        owners = {
            id(param)
            for module in model.modules()
            if (wanted in type(module).__name__.lower() if scope == "norm" else wanted == type(module).__name__.lower())
            for param in module.parameters(recurse=False)
        }
        found = {name: param for name, param in params.items() if id(param) in owners}
    else:
        pattern = re.compile(scope)
        found = {name: param for name, param in params.items() if pattern.search(clean(name))}
    if not found:
        raise UserError(f"scope '{scope}' matches none of the trainable parameters, e.g. '{next(iter(params), '')}'.")
    return found


def refuse_low_precision(params: Params, method: str, rounding: bool) -> None:
    """UserError for weights stored so coarsely that a perturbation would mostly round away."""
    for name, param in params.items():
        if param.dtype == torch.float16 or (param.dtype == torch.bfloat16 and not rounding):
            raise UserError(
                f"{method}: '{name}' is stored in {str(param.dtype).removeprefix('torch.')}, which rounds most of the "
                "perturbation away. Load the model with dtype='float32' and train with bf16=True (autocast)"
                + (
                    ", or set stochastic_rounding=true, which keeps the perturbation right on average."
                    if param.dtype == torch.bfloat16
                    else "."
                )
            )


@torch.no_grad()
def sizes(moved: dict[str, nn.Parameter], kind: str, eta: float) -> list[Tensor]:
    """ASAM's T, by ``kind``; its perturbation is ρ·T²g/‖Tg‖.

    ``asam``: |θ| + η for parameters named ``weight``, 1 for others (Kwon et al. 2021, section 3 and their code).
    ``magnitude``: |θ| for all parameters, without η: the form of the widely used PyTorch implementation.
    The two are different functions of ρ: a value found for one is no value for the other.
    """
    found = []
    for name, param in moved.items():
        weight = local(param)
        if kind == "asam":
            found.append(weight.abs() + eta if name.endswith("weight") else torch.ones_like(weight))
        else:
            found.append(weight.abs())
    return found


@torch.no_grad()
def noise_like(params: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    """Gaussian noise in the parameters' shapes; the same for every number of ranks and every kind of sharding."""
    generator = torch.Generator().manual_seed(seed)
    return [
        shard_like(torch.randn(param.shape, generator=generator, dtype=torch.float32), param, keep_dtype=True)
        for param in params
    ]


@torch.no_grad()
def top_mask(importance: Sequence[Tensor], keep: float) -> list[Tensor]:
    """Masks of the ``keep`` share of all elements (over tensors and shards) with the largest importance.

    The threshold is found by bisection on counts, so that no rank needs all values. Ties above it are all kept.
    """
    parts = locals_(importance)
    size = float(sum(value.numel() for value in importance))
    low, high = 0.0, float(max((float(value.max()) for value in parts if value.numel()), default=0.0))
    if any(as_dtensor(value) is not None for value in importance):
        high_ = torch.tensor(high, device=parts[0].device)
        torch.distributed.all_reduce(high_, op=torch.distributed.ReduceOp.MAX)
        high = float(high_)
    for _ in range(60):
        middle = (low + high) / 2
        above = float(sum_over_shards([(value > middle).sum() for value in parts], importance))
        low, high = (middle, high) if above > keep * size else (low, middle)
    return [value > high for value in parts]


@torch.no_grad()
def move(weights: Sequence[Tensor], steps: Sequence[Tensor], seed: int | None) -> None:
    """weights += steps in place; bf16 weights with a seed are rounded stochastically, so that the mean is exact."""
    for weight, step in zip(weights, steps, strict=True):
        if weight.dtype in LOW_PRECISION and seed is not None:
            weight.copy_(round_stochastically(weight.float() + step.float(), seed))
            seed += 1
        else:
            weight.add_(step)


@torch.no_grad()
def round_stochastically(values: Tensor, seed: int) -> Tensor:
    """fp32 -> bf16, up or down with the probability that makes the expected value exact.

    A bf16 number is an fp32 number whose low 16 bits are zero: adding 16 random bits and cutting off the low half
    rounds away from zero with probability (low half)/2¹⁶.
    """
    generator = torch.Generator(device=values.device).manual_seed(seed % (1 << 63))
    bits = values.contiguous().view(torch.int32)
    random_bits = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = ((bits + random_bits) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


@torch.no_grad()
def realised(moved: Sequence[Tensor], saved: Sequence[Tensor], intended: Sequence[Tensor]) -> tuple[float, float]:
    """What rounding left of a perturbation: its norm, and its cosine to the intended one (local parts)."""
    done = [local(weight).float() - before.float() for weight, before in zip(moved, saved, strict=True)]
    length = norm(done, like=moved)
    scale = length * norm(intended, like=moved)
    return float(length), float(dot(done, intended, like=moved) / scale) if scale > 0 else 0.0
