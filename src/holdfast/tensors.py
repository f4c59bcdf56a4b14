"""Shard-safe maths on parameters: norms, averages and copies that mean the same on 1 process, DDP and FSDP2.

A parameter may be a plain tensor (whole on every rank) or a DTensor (each rank holds a shard). Elementwise work runs
on the local part; only sums over all elements need the other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Params = Mapping[str, nn.Parameter]

PIECE = 1 << 17  # numbers that stay in a processor's cache while several operations go over them


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor as a DTensor if it is one (sharded or replicated over a device mesh), else None."""
    return tensor if isinstance(tensor, DTensor) else None


def named(params: Params | Iterable[Tensor]) -> dict[str, nn.Parameter]:
    """Parameters by name, each storage once (a tied embedding has several names, but must be edited once)."""
    pairs: Iterable[tuple[str, Any]]
    if isinstance(params, Mapping):
        pairs = params.items()
    else:
        pairs = ((str(index), param) for index, param in enumerate(params))
    seen: set[int] = set()
    unique: dict[str, nn.Parameter] = {}
    for name, param in pairs:
        if id(param) not in seen:
            seen.add(id(param))
            unique[name] = param
    return unique


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by plain name (wrapper prefixes removed), each storage once."""
    found = {clean(name): param for name, param in model.named_parameters() if param.requires_grad}
    return named(found)


def clean(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and activation checkpointing put in front."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory (writes go through)."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Aligned stretches of tensors of one shape, sharing their memory.

    On a processor memory bounds elementwise work; stretch by stretch, what one operation wrote is still in the cache
    when the next one reads it. Tensors on an accelerator, small ones and ones that are not contiguous come whole.
    """
    size = tensors[0].numel()
    if size <= PIECE or any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, size, PIECE):
        yield tuple(tensor[start : start + PIECE] for tensor in flat)


def locals_(tensors: Iterable[Tensor]) -> list[Tensor]:
    """:func:`local` of each tensor."""
    return [local(tensor) for tensor in tensors]


def with_gradient(params: Params) -> list[nn.Parameter]:
    """The parameters that received a gradient (unused and frozen ones did not)."""
    return [param for param in params.values() if param.grad is not None]


def gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients of parameters that have one."""
    return [cast(Tensor, param.grad) for param in params if param.grad is not None]


def sum_over_shards(values: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Sum one value per tensor over tensors, and over the ranks that hold different shards of a tensor.

    ``like`` holds the tensors the values were computed from: they tell how each is sharded.
    """
    by_groups: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for value, tensor in zip(values, like, strict=True):
        sharded = as_dtensor(tensor)
        mesh: Any = None
        dims: tuple[int, ...] = ()
        if sharded is not None:
            mesh = sharded.device_mesh
            dims = tuple(dim for dim, place in enumerate(sharded.placements) if not place.is_replicate())
        by_groups.setdefault((mesh, dims), []).append(value)
    total: Tensor | None = None
    for (mesh, dims), group in by_groups.items():
        part = torch.stack([value.to(group[0].device) for value in group]).sum()
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        total = part if total is None else total + part.to(total.device)
    return torch.zeros(()) if total is None else total


def _accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@torch.no_grad()
def norm(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """Euclidean norm over all elements of all tensors on all shards, as a 0-d fp32 tensor (fp64 for fp64 input).

    ``like`` tells how the tensors are sharded if they are local parts. Every rank gets the same value; a norm of local
    shards would be too small by the square root of the ranks.
    """
    if not tensors:
        return torch.zeros(())
    parts = locals_(tensors)
    squares = [value.square() for value in torch._foreach_norm(parts, 2, dtype=_accumulator(parts))]
    return sum_over_shards(squares, tensors if like is None else like).sqrt()


@torch.no_grad()
def dot(left: Sequence[Tensor], right: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """Inner product over all elements of all tensors on all shards, as a 0-d fp32 tensor (fp64 for fp64 input)."""
    if not left:
        return torch.zeros(())
    dtype = _accumulator(left)
    values = [(a.to(dtype) * b.to(dtype)).sum() for a, b in zip(locals_(left), locals_(right), strict=True)]
    return sum_over_shards(values, left if like is None else like)


@torch.no_grad()
def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the local parts."""
    return [part.clone() for part in locals_(tensors)]


@torch.no_grad()
def restore(tensors: Iterable[Tensor], saved: Sequence[Tensor]) -> None:
    """Put saved local parts back, bit for bit (subtracting what was added would not be exact)."""
    parts = locals_(tensors)
    if parts:
        torch._foreach_copy_(parts, list(saved))


@torch.no_grad()
def pull(tensor: Tensor, anchor: Tensor, weight: float) -> None:
    """tensor <- (1 - weight) * tensor + weight * anchor on the local part; low-precision weights in fp32."""
    part = local(tensor)
    if part.dtype in (torch.bfloat16, torch.float16):
        part.copy_(part.float().mul_(1.0 - weight).add_(anchor.float(), alpha=weight))
    else:
        part.mul_(1.0 - weight).add_(anchor, alpha=weight)


@torch.no_grad()
def shard_like(full: Tensor, like: Tensor, keep_dtype: bool = False) -> Tensor:
    """This rank's part of a whole tensor, cut and placed as ``like`` is; no communication."""
    sharded = as_dtensor(like)
    target = local(like)
    moved = full.to(device=target.device, dtype=full.dtype if keep_dtype else target.dtype)
    if sharded is None:
        return moved
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()


def make_editable(model: nn.Module | None) -> None:
    """Before weights are edited: put FSDP2 modules back to their shards.

    After a forward without backward FSDP2 may keep the gathered weights, and edits of the shards would be lost.
    """
    if model is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
