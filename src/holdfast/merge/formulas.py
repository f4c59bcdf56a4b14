"""What a merge computes, on one stretch of one tensor at a time.

A formula sees stretches of at most ``scratch.CHUNK`` numbers, decoded to the working type, so it never knows whether
the tensors lie in memory or in files. Facts about whole tensors (thresholds, angles) are gathered first by ``prepare``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from holdfast.merge.numbers import Array, magnitude_bits
from holdfast.merge.scratch import CHUNK, Scratch, run_jobs
from holdfast.merge.select import Cut
from holdfast.merge.thresholds import tensor_cuts, whole_cuts


class Place(NamedTuple):
    """Where a stretch lies: tensor name and flat index of its first number."""

    name: str
    start: int


class Numbers(Protocol):
    """Input tensors, flattened: ``sizes`` by name, and stretches of them as floating point arrays."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def read(self, which: int, name: str, start: int, stop: int, scratch: Scratch) -> Array:
        """Numbers start..stop of input ``which``, in arrays that the next call with the same ``which`` reuses."""
        ...


Facts = Mapping[str, Any]


class Formula(Protocol):
    """One merge: which inputs it reads, facts about whole tensors, and the result on one stretch."""

    def used(self) -> tuple[int, ...]:
        """Indices of the inputs that the result depends on."""
        ...

    def prepare(self, numbers: Numbers, threads: int) -> Facts:
        """Facts by tensor name, from one or more passes over the inputs; empty if none are needed."""
        ...

    def apply(self, place: Place, inputs: Sequence[Array | None], facts: Facts, scratch: Scratch) -> Array:
        """The merged stretch; inputs are left unchanged."""
        ...


def stretches(size: int, length: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) that cover ``size``."""
    for start in range(0, size, length):
        yield start, min(size, start + length)


def combine(weights: Sequence[float], inputs: Sequence[Array | None], scratch: Scratch) -> Array:
    """Sum of wᵢ·xᵢ; an input of weight zero is not touched, so weights (1, 0) give the first back bit for bit.

    Sums in float64 whatever the inputs are, so that terms which nearly cancel leave the right number. Two terms
    with weights of ±1 or ±1/2 (a plain mean, a sum, a difference) need it not: in their own precision only the sum is
    rounded, once.
    """
    chosen = [(weight, values) for weight, values in zip(weights, inputs) if weight != 0 and values is not None]
    if not chosen:
        some = next(values for values in inputs if values is not None)
        zeros = scratch.get("total", some.dtype, some.size)
        zeros[...] = 0
        return zeros
    (weight, values), *others = chosen
    exact = len(chosen) <= 2 and all(abs(weight) in (0.5, 1) for weight, _ in chosen)
    kind = values.dtype if exact else np.dtype(np.float64)
    total = scratch.get("total", kind, values.size)
    with np.errstate(over="ignore"):
        np.multiply(values, kind.type(weight), out=total, dtype=kind)
        for weight, more in others:
            term = scratch.get("term", kind, values.size)
            np.add(total, np.multiply(more, kind.type(weight), out=term, dtype=kind), out=total)
        if values.dtype == kind:
            return total
        rounded = scratch.get("rounded", values.dtype, values.size)
        np.copyto(rounded, total, casting="same_kind")
    return rounded


@dataclass(frozen=True)
class Combination:
    """The same weighted sum everywhere: linear, WiSE-FT, task arithmetic and negation."""

    weights: tuple[float, ...]

    def used(self) -> tuple[int, ...]:
        return tuple(i for i, weight in enumerate(self.weights) if weight != 0) or (0,)

    def prepare(self, numbers: Numbers, threads: int) -> Facts:
        return {}

    def apply(self, place: Place, inputs: Sequence[Array | None], facts: Facts, scratch: Scratch) -> Array:
        return combine(self.weights, inputs, scratch)


def inner_product(x: Array, y: Array, scratch: Scratch) -> float:
    """Inner product of two stretches, in float64."""
    return float(np.multiply(x, y, out=scratch.get("product", np.float64, x.size), dtype=np.float64).sum())


def tensor_sums(
    numbers: Numbers, measure: Callable[[str, int, int, Scratch], Sequence[float]], threads: int
) -> dict[str, list[float]]:
    """What ``measure`` finds on stretches (name, start, stop), added up by tensor, in a fixed order on any threads."""
    found: dict[str, list[list[float]]] = {}

    def job(name: str, index: int, start: int, stop: int) -> Any:
        def run(scratch: Scratch) -> None:
            parts = [measure(name, start + low, start + high, scratch) for low, high in stretches(stop - start, CHUNK)]
            found[name][index] = [sum(column) for column in zip(*parts)]

        return run

    jobs = []
    for name, size in numbers.sizes.items():
        blocks = list(stretches(size, 16 * CHUNK))
        found[name] = [[]] * len(blocks)
        jobs += [job(name, index, *block) for index, block in enumerate(blocks)]
    run_jobs(jobs, threads)
    return {name: [math.fsum(column) for column in zip(*parts)] for name, parts in found.items()}


@dataclass(frozen=True)
class Slerp:
    """Along the great circle between two tensors: sin((1-t)Ω)/sin Ω·a + sin(tΩ)/sin Ω·b, Ω the angle between them.

    Nearly parallel tensors (|cos Ω| > 0.9995) and zero ones are interpolated linearly.
    """

    t: float

    def used(self) -> tuple[int, ...]:
        return (0, 1)

    def prepare(self, numbers: Numbers, threads: int) -> Facts:
        """name -> (weight of a, weight of b)"""

        def products(name: str, start: int, stop: int, scratch: Scratch) -> list[float]:
            a, b = (numbers.read(which, name, start, stop, scratch) for which in (0, 1))
            return [inner_product(x, y, scratch) for x, y in ((a, b), (a, a), (b, b))]

        return {name: self._weights(*sums) for name, sums in tensor_sums(numbers, products, threads).items()}

    def _weights(self, dot: float = 0.0, aa: float = 0.0, bb: float = 0.0) -> tuple[float, float]:
        cosine = dot / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 1.0
        if abs(cosine) > 0.9995 or self.t in (0.0, 1.0):
            return 1 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)

    def apply(self, place: Place, inputs: Sequence[Array | None], facts: Facts, scratch: Scratch) -> Array:
        return combine(facts[place.name], inputs[:2], scratch)


@dataclass(frozen=True)
class FisherMean:
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ (eq. 15); where every Fisher value is zero, the plain mean weighted by w.

    ``normalize`` divides every Fᵢ by its Euclidean norm over the whole model, so that models which fit their data to
    different degrees count alike.
    """

    weights: tuple[float, ...]
    normalize: bool = False

    @property
    def scope(self) -> str:
        return "model" if self.normalize else "tensor"

    def used(self) -> tuple[int, ...]:
        return tuple(range(2 * len(self.weights)))

    def prepare(self, numbers: Numbers, threads: int) -> Facts:
        """Under "factors": what each Fᵢ is multiplied by."""
        n = len(self.weights)
        if not self.normalize:
            return {"factors": self.weights}

        def squares(name: str, start: int, stop: int, scratch: Scratch) -> list[float]:
            read = (numbers.read(n + i, name, start, stop, scratch) for i in range(n))
            return [inner_product(values, values, scratch) for values in read]

        sums = tensor_sums(numbers, squares, threads).values()
        norms = [math.sqrt(math.fsum(column)) or 1.0 for column in zip(*filter(None, sums))] or [1.0] * n
        return {"factors": tuple(weight / norm for weight, norm in zip(self.weights, norms))}

    def apply(self, place: Place, inputs: Sequence[Array | None], facts: Facts, scratch: Scratch) -> Array:
        n = len(self.weights)
        models, fishers, factors = inputs[:n], inputs[n:], facts["factors"]
        mass = combine(factors, fishers, scratch)
        empty = np.less_equal(mass, np.finfo(mass.dtype).tiny)
        plain = sum(self.weights)
        result = scratch.get("result", mass.dtype, mass.size)
        result[...] = 0
        mass[empty] = plain
        for weight, factor, values, importance in zip(self.weights, factors, models, fishers):
            if values is None or importance is None or weight == 0:
                continue
            share = scratch.get("share", mass.dtype, mass.size)
            np.multiply(importance, mass.dtype.type(factor), out=share)
            share[empty] = weight
            np.divide(share, mass, out=share)
            np.multiply(share, values, out=share)
            np.add(result, share, out=result)
        return result


@dataclass(frozen=True)
class Deltas:
    """θ₀ + scale·consensus(wᵢ·rescale·sparsify(θᵢ - θ₀)): TIES, DARE and magnitude pruning as one table of choices.

    ``sparsify`` keeps the largest magnitudes or a random share; ``consensus`` adds up, or elects a sign per number by
    total mass and averages what agrees with it. ``scope`` decides over what magnitudes are ranked.
    """

    weights: tuple[float, ...]
    density: float
    sparsify: Literal["magnitude", "random"]
    consensus: Literal["sum", "elect"]
    scope: Literal["tensor", "model"] = "tensor"
    rescale: bool = False
    scale: float = 1.0
    seed: int = 0

    def used(self) -> tuple[int, ...]:
        return tuple(range(len(self.weights) + 1))

    def prepare(self, numbers: Numbers, threads: int) -> Facts:
        if self.sparsify == "random" or self.density >= 1:
            return {}
        cuts = whole_cuts if self.scope == "model" else tensor_cuts
        return cuts(numbers, len(self.weights), self.density, threads)

    def apply(self, place: Place, inputs: Sequence[Array | None], facts: Facts, scratch: Scratch) -> Array:
        base = inputs[0]
        assert base is not None
        votes = Votes(base.size, base.dtype, self, scratch) if self.consensus == "elect" else None
        total = scratch.get("total", base.dtype, base.size)
        total[...] = 0
        for i, (weight, tuned) in enumerate(zip(self.weights, inputs[1:])):
            assert tuned is not None
            delta = np.subtract(tuned, base, out=scratch.get("delta", base.dtype, base.size))
            self._sparsify(delta, place, i, facts, scratch)
            factor = weight / self.density if self.rescale else weight
            if factor != 1:
                np.multiply(delta, delta.dtype.type(factor), out=delta)
            if votes is None:
                np.add(total, delta, out=total)
            else:
                votes.add(delta, weight)
        if votes is not None:
            votes.mean(total)
        if self.scale != 1:
            np.multiply(total, total.dtype.type(self.scale), out=total)
        return np.add(total, base, out=total)

    def _sparsify(self, delta: Array, place: Place, which: int, facts: Facts, scratch: Scratch) -> None:
        if self.density >= 1:
            return
        if self.sparsify == "random":
            kept = random_bits(self.seed, which, place, delta.size) < np.uint32(self.density * 2**32)
        else:
            cut: Cut = facts[place.name][which]
            kept = cut.keep(magnitude_bits(delta, scratch.get("bits", np.uint32, delta.size)), place.start)
        np.multiply(delta, kept, out=delta)


class Votes:
    """Sign election: mass and number (or weight) of the deltas on either side of zero."""

    def __init__(self, size: int, dtype: Any, formula: Deltas, scratch: Scratch) -> None:
        self._scratch = scratch
        self._same = len(set(formula.weights)) == 1 and len(formula.weights) < 256
        self._weight = formula.weights[0]
        # A side that nobody outweighs: the plus side wins per tensor (as mergekit does), nobody wins in model scope
        # (sgn 0 = 0 in the paper's formula).
        self._even_is_plus = formula.scope == "tensor"
        counts = np.uint8 if self._same else dtype
        self.plus, self.minus = (scratch.get(name, dtype, size) for name in ("plus", "minus"))
        self.plus_count, self.minus_count = (scratch.get(name, counts, size) for name in ("plus#", "minus#"))
        for array in (self.plus, self.minus, self.plus_count, self.minus_count):
            array[...] = 0

    def add(self, delta: Array, weight: float) -> None:
        """Count one model's weighted deltas; zero is on no side."""
        part = self._scratch.get("part", delta.dtype, delta.size)
        for mass, count, side, compare in (
            (self.plus, self.plus_count, np.maximum, np.greater),
            (self.minus, self.minus_count, np.minimum, np.less),
        ):
            np.add(mass, side(delta, 0, out=part), out=mass)
            ours = compare(delta, 0)
            np.add(count, ours.view(np.uint8) if self._same else ours * count.dtype.type(weight), out=count)

    def mean(self, out: Array) -> Array:
        """Weighted mean of the deltas on the winning side, 0 where there is none."""
        minus_mass = np.negative(self.minus, out=self._scratch.get("part", out.dtype, out.size))
        for_plus = np.greater_equal(self.plus, minus_mass)
        for_minus = ~for_plus
        if not self._even_is_plus:
            for_plus = np.greater(self.plus, minus_mass)
        np.multiply(self.plus, for_plus, out=self.plus)
        np.multiply(self.minus, for_minus, out=self.minus)
        np.add(self.plus, self.minus, out=out)
        if self._same:
            count = self.plus_count * for_plus.view(np.uint8)
            count += self.minus_count * for_minus.view(np.uint8)
            np.maximum(count, 1, out=count)
            np.divide(out, count, out=out)
            return out if self._weight == 1 else np.divide(out, out.dtype.type(self._weight), out=out)
        count = self.plus_count * for_plus
        count += self.minus_count * for_minus
        count[count == 0] = 1
        return np.divide(out, count, out=out)


def random_bits(seed: int, which: int, place: Place, size: int) -> Array:
    """``size`` uniform 32-bit integers that depend on seed, model, tensor name and position only, not on threads."""
    assert place.start % CHUNK == 0 and size <= CHUNK
    key = [seed, which, zlib.crc32(place.name.encode()), place.start // CHUNK]
    stream = np.random.PCG64(np.random.SeedSequence(key))
    raw: Array = stream.random_raw((size + 1) // 2)
    return raw.view(np.uint32)[:size]
