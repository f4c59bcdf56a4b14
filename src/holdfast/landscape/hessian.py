"""Hessian trace and top eigenvalues; Lanczos and Hutchinson are those of the hessian-eigenthings package."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import UserError
from holdfast.landscape.directions import Stored, products
from holdfast.landscape.gradients import gradient, gradients_aside
from holdfast.landscape.objective import Data, Objective, objective_of
from holdfast.landscape.ranks import Ranks, Split
from holdfast.landscape.weights import Mover, Scope, is_sharded, moving

Product = Literal["auto", "autograd", "finite_difference"]


@dataclass(frozen=True)
class Curvature:
    """Spectrum of the loss's Hessian over the moved weights, in nats per token and squared weight.

    ``trace`` is Hutchinson's estimate and ``trace_error`` its standard error over probes (NaN for one probe).
    ``eigenvalues`` are the largest in magnitude; ``residuals`` bound the error of each, ``converged`` says which
    are within ``tolerance``.
    """

    trace: float
    trace_error: float
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    parameters: int
    meta: dict[str, Any] = field(default_factory=dict)


def curvature(
    model: nn.Module,
    data: Data,
    *,
    eigenvalues: int = 3,
    iterations: int = 20,
    probes: int = 10,
    tolerance: float = 1e-3,
    product: Product = "auto",
    seed: int = 0,
    tokenizer: Any = None,
    scope: Scope = "trainable",
    compute: str = "float32",
    split: Split = "auto",
    **subset: Any,
) -> Curvature:
    """Trace (Hutchinson, Rademacher probes) and top eigenvalues (Lanczos) of H = ∇²L over the whole subset.

    ``product``: Hv by double backward ("autograd"; exact, attention on the plain kernel) or from two gradients
    at θ ± hv ("finite_difference"; for sharded weights, the default there). Cost: probes + iterations products,
    each about 2 forwards and backwards over the subset; iterations + 1 vectors of the size of the moved weights.

    Raises UserError if the optional package isn't installed, or a double backward isn't possible.
    """
    library = _library()
    objective = objective_of(data, tokenizer, compute=compute, **subset)
    with moving(model, scope) as mover:
        ranks = Ranks.of(mover.model, "data" if split in ("auto", "points") else split)
        sharded = any(is_sharded(parameter) for parameter in mover.model.parameters())
        chosen = ("finite_difference" if sharded else "autograd") if product == "auto" else product
        if chosen not in ("autograd", "finite_difference") or (sharded and chosen == "autograd"):
            raise UserError(f"product '{product}' can't be used here; sharded weights need 'finite_difference'")
        times = _by_autograd if chosen == "autograd" else _by_difference
        with _double_backward_attention():
            operator = _operator(library, mover, lambda v: times(mover, objective, ranks, v))
            backend = _backend(library) if sharded else None
            own_seed = seed + (ranks.rank << 16 if sharded else 0)  # shards need independent probes
            steps = min(max(iterations, eigenvalues), operator.size)
            found = library.lanczos(operator, k=min(eigenvalues, operator.size), max_iter=steps, tol=tolerance,
                                    reorthogonalize=True, seed=own_seed, backend=backend)  # fmt: skip
            traced = library.trace(operator, num_matvecs=probes, method="hutchinson", seed=own_seed, backend=backend)
        count = sum(cell.count for cell in mover.cells)
    return Curvature(
        trace=float(traced.estimate),
        trace_error=float(traced.stderr) if probes > 1 else math.nan,
        eigenvalues=tuple(float(x) for x in found.eigenvalues),
        residuals=tuple(float(x) for x in found.residuals),
        converged=tuple(bool(x) for x in found.converged),
        parameters=count,
        meta={"product": chosen, "probes": probes, "iterations": int(found.iterations), "seed": seed,
              "scope": scope, "compute": compute, "tokens": getattr(objective, "tokens", None)},
    )  # fmt: skip


def _library() -> Any:
    try:
        return importlib.import_module("hessian_eigenthings")
    except ImportError as error:
        raise UserError(
            "Hessian trace and eigenvalues need the package hessian-eigenthings (1.0 or newer): "
            "pip install 'hessian-eigenthings>=1.0.0a1'"
        ) from error


def _operator(library: Any, mover: Mover, times: Callable[[Tensor], Tensor]) -> Any:
    module = importlib.import_module("hessian_eigenthings.operators.base")
    first = mover.cells[0]
    size = sum(cell.view.numel() for cell in mover.cells)
    return module.LambdaOperator(times, size, first.view.device, first.work_dtype)


def _backend(library: Any) -> Any:
    """Vector arithmetic on shards: inner products and norms are summed over the ranks."""
    base = importlib.import_module("hessian_eigenthings.linalg").SingleDeviceBackend

    class Shards(base):  # type: ignore[misc,valid-type]
        def dot(self, a: Tensor, b: Tensor) -> Tensor:
            value = torch.dot(a.reshape(-1), b.reshape(-1))
            dist.all_reduce(value)
            return value

        def norm(self, a: Tensor) -> Tensor:
            return self.dot(a, a).sqrt()

    return Shards()


def _by_autograd(mover: Mover, objective: Objective, ranks: Ranks, vector: Tensor) -> Tensor:
    """Hv = Σ over parts of ∂(∂lossᵢ·v) / Σ weights, by double backward."""
    named = dict(mover.model.named_parameters())
    parameters = [named[cell.name] for cell in mover.cells]
    pieces = _split(mover, vector)
    shared = ranks.split == "data" and objective.parts > 1
    mine = range(ranks.rank, objective.parts, ranks.world) if shared else range(objective.parts)
    total, weight = torch.zeros_like(vector), 0.0
    with gradients_aside(mover.model, parameters), torch.enable_grad():
        for part in mine:
            value, count = objective.sums(mover.model, part)
            weight += count
            grads = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
            dotted = [(g * v.view_as(g)).sum() for g, v in zip(grads, pieces, strict=True) if g is not None]
            if not any(value.requires_grad for value in dotted):
                continue  # a linear loss: its Hessian is zero
            try:
                seconds = torch.autograd.grad(sum(dotted[1:], dotted[0]), parameters, allow_unused=True)
            except RuntimeError as error:
                raise UserError(
                    f"this model has no double backward ({error}); load it with attn_implementation='eager' "
                    "or use product='finite_difference'"
                ) from error
            flat = [torch.zeros_like(p) if s is None else s for s, p in zip(seconds, parameters, strict=True)]
            total += torch.cat([s.reshape(-1).to(vector.dtype) for s in flat])
    if shared:
        dist.all_reduce(total)
        weight = sum(ranks.agree(weight))
    return total / weight


def _by_difference(mover: Mover, objective: Objective, ranks: Ranks, vector: Tensor) -> Tensor:
    """Hv from central differences of the gradient; h weighs rounding against truncation (ε^(1/3) of ‖θ‖/‖v‖)."""
    pieces = _split(mover, vector)
    along = Stored({cell.name: piece for cell, piece in zip(mover.cells, pieces, strict=True)})
    table = products(mover, [along])
    length, weights = math.sqrt(table[0][0]), math.sqrt(table[1][1])
    roundoff = max(torch.finfo(cell.view.dtype).eps for cell in mover.cells)
    step = roundoff ** (1 / 3) * max(weights, 1.0) / length * 0.1
    found = []
    for sign in (1.0, -1.0):
        mover.move([(sign * step, along)])
        found.append(torch.cat([g.reshape(-1) for g in gradient(mover, objective, ranks)]))
    mover.restore()
    return (found[0] - found[1]) / (2 * step)


def _split(mover: Mover, vector: Tensor) -> list[Tensor]:
    return list(vector.split([cell.view.numel() for cell in mover.cells]))


@contextmanager
def _double_backward_attention() -> Iterator[None]:
    """Scaled-dot-product attention on its plain kernel: the fused ones have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield
