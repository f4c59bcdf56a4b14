"""The merge formulas as pure functions of tensors, or of mappings from names to tensors.

Tensors are torch tensors or numpy arrays; the result has the type, dtype, shape and device of the base (or of the first
model). All arithmetic is at least one precision above the dtype (weighted sums in float64, the rest in float32 for
16-bit numbers), with one rounding to nearest even at the end. Cost: one read of every input, one transient copy of a
few hundred KiB. A shape or name that does not match raises ``UserError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from holdfast.errors import UserError
from holdfast.merge import families
from holdfast.merge.formulas import Formula, Place, stretches
from holdfast.merge.numbers import FROM_TORCH, MERGEABLE, Array, decode, encode, working_type
from holdfast.merge.scratch import CHUNK, Job, Scratch, cores, run_jobs

Value = Any  # a tensor or a mapping of tensors: what goes in comes out
THREADED = 1 << 20  # numbers below which threads cost more than they give


class MemoryNumbers:
    """Tensors in memory as a formula reads them."""

    def __init__(self, inputs: Sequence[Mapping[str, tuple[Array, str]]], working: Any) -> None:
        self._inputs, self._working = inputs, working
        self.sizes = {name: raw.size for name, (raw, _) in inputs[0].items()}

    def read(self, which: int, name: str, start: int, stop: int, scratch: Scratch) -> Array:
        raw, dtype = self._inputs[which][name]
        return decode(raw[start:stop], dtype, scratch.get(f"in{which}", self._working, stop - start))


def as_raw(tensor: Any) -> tuple[Array, str]:
    """The bits of a tensor as a flat numpy array, and their safetensors dtype."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1), FROM_TORCH.get(str(tensor.dtype), str(tensor.dtype))
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"expected a tensor, got {type(tensor).__name__}.")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    dtype = FROM_TORCH[str(flat.dtype).removeprefix("torch.")]
    return (flat.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else flat.numpy()), dtype


def as_like(raw: Array, like: Any) -> Any:
    """Inverse of ``as_raw``: a tensor of the type, shape and device of ``like``."""
    if isinstance(like, np.ndarray):
        return raw.reshape(like.shape)
    import torch

    flat = (
        torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
        if like.dtype == torch.bfloat16
        else torch.from_numpy(raw)
    )
    return flat.reshape(like.shape).to(like.device)


def run_formula(formula: Formula, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Apply a formula to the tensors of ``inputs``; the first input decides names, dtypes and shapes."""
    raw = [{name: as_raw(one[name]) for name in inputs[0]} for one in inputs]
    result: dict[str, Any] = {}
    by_type: dict[Any, list[str]] = {}
    for name, (array, dtype) in raw[0].items():
        if dtype not in MERGEABLE:
            _require_equal(name, [one[name][0] for one in raw])
            result[name] = as_like(array.copy(), inputs[0][name])
        else:
            by_type.setdefault(working_type(dtype), []).append(name)
    if len(by_type) > 1 and getattr(formula, "scope", "") == "model":
        by_type = {np.float64: [name for names in by_type.values() for name in names]}
    for working, names in by_type.items():
        merged = _run([{name: one[name] for name in names} for one in raw], formula, working)
        result.update({name: as_like(merged[name], inputs[0][name]) for name in names})
    return {name: result[name] for name in inputs[0]}


def _run(raw: Sequence[Mapping[str, tuple[Array, str]]], formula: Formula, working: Any) -> dict[str, Array]:
    numbers = MemoryNumbers(raw, working)
    threads = cores() if sum(numbers.sizes.values()) >= THREADED else 1
    facts = formula.prepare(numbers, threads)
    merged = {name: np.empty_like(array) for name, (array, _) in raw[0].items()}
    used = set(formula.used())

    def job(name: str, block: int, end: int) -> Job:
        def run(scratch: Scratch) -> None:
            for low, high in stretches(end - block, CHUNK):
                start, stop = block + low, block + high
                inputs = [numbers.read(i, name, start, stop, scratch) if i in used else None for i in range(len(raw))]
                values = formula.apply(Place(name, start), inputs, facts, scratch)
                encode(
                    values, raw[0][name][1], merged[name][start:stop], scratch.get("carry", np.float32, stop - start)
                )

        return run

    run_jobs(
        [job(name, *part) for name, size in numbers.sizes.items() for part in stretches(size, 16 * CHUNK)], threads
    )
    return merged


def _require_equal(name: str, arrays: Sequence[Array]) -> None:
    if any(not np.array_equal(arrays[0], other) for other in arrays[1:]):
        raise UserError(f"tensor '{name}' is not floating point and differs between the inputs, so it can't be merged.")


def _apply(formula: Formula, inputs: Sequence[Value]) -> Value:
    """Run on mappings tensor by tensor (lazily loaded ones stay lazy), or on bare tensors."""
    first = inputs[0]
    if not isinstance(first, Mapping):
        _check_shapes("the tensor", inputs)
        return run_formula(formula, [{"": one} for one in inputs])[""]
    for other in inputs[1:]:
        if not isinstance(other, Mapping) or set(other) != set(first):
            differing = sorted(set(first) ^ set(other))[:5] if isinstance(other, Mapping) else []
            raise UserError(f"the inputs must be mappings with the same names; differing: {', '.join(differing)}.")
    if getattr(formula, "scope", "") == "model":
        for name in first:
            _check_shapes(f"'{name}'", [one[name] for one in inputs])
        return run_formula(formula, inputs)
    merged = {}
    for name in first:
        tensors = [one[name] for one in inputs]
        _check_shapes(f"'{name}'", tensors)
        merged[name] = run_formula(formula, [{name: tensor} for tensor in tensors])[name]
    return merged


def _check_shapes(what: str, tensors: Sequence[Any]) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise UserError(f"{what} has different shapes in the inputs: {', '.join(map(str, shapes))}.")


def linear(models: Sequence[Value], weights: Sequence[float] | None = None, normalize: bool = True) -> Value:
    """Weighted mean Σ wᵢθᵢ / Σ wᵢ (model soups; Wortsman et al. 2022); ``normalize=False`` leaves out the division."""
    return _apply(families.linear(len(models), weights, normalize), models)


def wise_ft(base: Value, tuned: Value, alpha: float = 0.5) -> Value:
    """(1-α)θ₀ + αθ (Wortsman et al. 2022b); with β = 1-α this is one averaging step of SFA."""
    return _apply(families.wise_ft(alpha), [base, tuned])


def task_arithmetic(base: Value, models: Sequence[Value], weights: Sequence[float] | float | None = None) -> Value:
    """θ₀ + Σ wᵢ(θᵢ-θ₀) (Ilharco et al. 2023), every weight 1 by default; a negative weight unlearns."""
    return _apply(families.task_arithmetic(len(models), weights), [base, *models])


def negation(base: Value, tuned: Value, weight: float = 1.0) -> Value:
    """θ₀ - w(θ-θ₀): forgetting by negation (Ilharco et al. 2023)."""
    return _apply(families.task_arithmetic(1, [-weight]), [base, tuned])


def ties(
    base: Value,
    models: Sequence[Value],
    weights: Sequence[float] | float | None = None,
    density: float = families.TIES_DENSITY,
    scope: Literal["tensor", "model"] = "tensor",
    scale: float = 1.0,
) -> Value:
    """θ₀ + λ·(disjoint mean of the trimmed wᵢ(θᵢ-θ₀) that agree with the elected sign) (Yadav et al. 2023).

    Trimming keeps the int(density·size) largest magnitudes, of each tensor (as mergekit; of equal magnitudes the first)
    or of the whole model (as the paper; equal magnitudes at the threshold all stay). The elected sign is that of the
    weighted sum; ``scale`` is the paper's λ.
    """
    return _apply(families.ties(len(models), weights, density, scope, scale), [base, *models])


def dare(
    base: Value,
    models: Sequence[Value],
    weights: Sequence[float] | float | None = None,
    density: float = families.DARE_DENSITY,
    seed: int = 0,
    consensus: Literal["linear", "ties"] = "linear",
    scale: float = 1.0,
) -> Value:
    """θ₀ + λ·Σ wᵢ·mᵢ⊙(θᵢ-θ₀)/density, mᵢ Bernoulli(density) (Yu et al. 2024, drop rate 1-density).

    ``consensus="ties"`` elects signs among the survivors and averages instead of adding. The mask depends on the seed,
    the model's place in the list, the tensor's name and the position only.
    """
    return _apply(families.dare(len(models), weights, density, seed, consensus, scale), [base, *models])


def magnitude_prune(
    base: Value,
    models: Sequence[Value],
    weights: Sequence[float] | float | None = None,
    density: float = families.PRUNE_DENSITY,
    scope: Literal["tensor", "model"] = "tensor",
) -> Value:
    """θ₀ + Σ wᵢ·trim(θᵢ-θ₀): only the largest changes are kept (the trim step of TIES on its own)."""
    return _apply(families.magnitude_prune(len(models), weights, density, scope), [base, *models])


def slerp(a: Value, b: Value, t: float = 0.5) -> Value:
    """sin((1-t)Ω)/sin Ω·a + sin(tΩ)/sin Ω·b per tensor, Ω the angle between them; linear if nearly parallel."""
    return _apply(families.slerp(t), [a, b])


def fisher(
    models: Sequence[Value],
    fishers: Sequence[Value],
    weights: Sequence[float] | None = None,
    normalize: bool = False,
) -> Value:
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ (Matena & Raffel 2022; eq. 15 of the SFA paper); the weighted mean where all Fᵢ are zero.

    ``normalize`` divides every Fᵢ by its Euclidean norm over all its tensors.
    """
    if len(models) != len(fishers):
        raise UserError(f"fisher needs one Fisher estimate per model: {len(models)} models, {len(fishers)} estimates.")
    return _apply(families.fisher(len(models), weights, normalize), [*models, *fishers])
