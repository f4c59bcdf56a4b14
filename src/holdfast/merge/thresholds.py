"""Exact trim thresholds of TIES and magnitude pruning, in bounded memory however long a tensor is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from holdfast.merge.numbers import Array, magnitude_bits
from holdfast.merge.scratch import CHUNK, Job, Scratch, run_jobs
from holdfast.merge.select import NO_LIMIT, Cut, Narrowing, cut_in_memory, index_of_tie, kept_count

if TYPE_CHECKING:
    from holdfast.merge.formulas import Numbers

IN_MEMORY = 1 << 20  # numbers partitioned in memory; longer tensors are counted block by block
BLOCK = 1 << 20
SPOTS = 64  # places sampled for the first guess
SPOT = 1024

Stretch = tuple[str, int, int]
Cuts = dict[str, tuple[Cut, ...]]


def tensor_cuts(numbers: Numbers, models: int, density: float, threads: int) -> Cuts:
    """One cut per tensor and model: exactly int(density·size) survive, of equal magnitudes the first ones."""
    cuts: Cuts = {}

    def small(name: str, size: int) -> Job:
        def run(scratch: Scratch) -> None:
            cuts[name] = _partition(numbers, name, size, models, density, scratch)

        return run

    large = [name for name, size in numbers.sizes.items() if size > IN_MEMORY]
    run_jobs([small(name, size) for name, size in numbers.sizes.items() if 0 < size <= IN_MEMORY], threads)
    for name in large:
        found = _narrow(numbers, [(name, numbers.sizes[name])], models, density, threads)
        cuts[name] = _split_ties(numbers, name, found, threads)
    return cuts


def whole_cuts(numbers: Numbers, models: int, density: float, threads: int) -> Cuts:
    """One cut per model over all tensors together; equal magnitudes at the threshold all survive."""
    tensors = [(name, size) for name, size in numbers.sizes.items() if size]
    if not tensors:
        return {}
    found = _narrow(numbers, tensors, models, density, threads)
    cuts = tuple(Cut(int(one.threshold or 0), NO_LIMIT) for one in found)
    return dict.fromkeys(numbers.sizes, cuts)


def _delta_bits(
    numbers: Numbers, stretch: Stretch, models: Iterable[int], scratch: Scratch, into: Callable[[int], Array]
) -> None:
    """Fill ``into(model)`` with the magnitude bits of the model's difference from the base."""
    name, start, stop = stretch
    for low in range(start, stop, CHUNK):
        high = min(stop, low + CHUNK)
        base = numbers.read(0, name, low, high, scratch)
        for which in models:
            tuned = numbers.read(which + 1, name, low, high, scratch)
            delta = np.subtract(tuned, base, out=scratch.get("delta", base.dtype, base.size))
            magnitude_bits(delta, into(which)[low - start : high - start])


def _partition(
    numbers: Numbers, name: str, size: int, models: int, density: float, scratch: Scratch
) -> tuple[Cut, ...]:
    bits = [scratch.get(f"bits{which}", np.uint32, size) for which in range(models)]
    _delta_bits(numbers, (name, 0, size), range(models), scratch, bits.__getitem__)
    keep, spare = kept_count(size, density), scratch.get("spare", np.uint32, size)
    return tuple(cut_in_memory(one, keep, True, spare) for one in bits)


def _narrow(
    numbers: Numbers, tensors: list[tuple[str, int]], models: int, density: float, threads: int
) -> list[Narrowing]:
    """Settle one selection per model over the given tensors taken together; every pass reads the base once."""
    size = sum(length for _, length in tensors)
    samples = _sample(numbers, tensors, models, size)
    chosen = [Narrowing(size, kept_count(size, density), sample) for sample in samples]
    open_ = list(range(models))
    while open_:

        def count(stretch: Stretch, these: tuple[int, ...] = tuple(open_)) -> Job:
            def run(scratch: Scratch) -> None:
                for low in range(stretch[1], stretch[2], CHUNK):  # counted while still in the cache
                    high = min(stretch[2], low + CHUNK)
                    arrays = {i: scratch.get(f"bits{i}", np.uint32, high - low) for i in these}
                    _delta_bits(numbers, (stretch[0], low, high), these, scratch, arrays.__getitem__)
                    for i in these:
                        chosen[i].add(arrays[i])

            return run

        blocks = [(name, low, min(low + BLOCK, length)) for name, length in tensors for low in range(0, length, BLOCK)]
        run_jobs([count(block) for block in blocks], threads)
        open_ = [i for i in open_ if not chosen[i].settle()]
    return chosen


def _sample(numbers: Numbers, tensors: list[tuple[str, int]], models: int, size: int) -> list[Array]:
    """Magnitude bits at evenly spaced places, for the first guess only."""
    wanted = [spot * size // SPOTS for spot in range(SPOTS)]
    scratch, found = Scratch(), [list[Array]() for _ in range(models)]
    first = 0
    for name, length in tensors:
        while wanted and wanted[0] < first + length:
            start = wanted.pop(0) - first
            stop = min(length, start + SPOT)
            buffers = [np.empty(stop - start, np.uint32) for _ in range(models)]
            _delta_bits(numbers, (name, start, stop), range(models), scratch, buffers.__getitem__)
            for i, buffer in enumerate(buffers):
                found[i].append(buffer)
        first += length
    return [np.concatenate(parts) for parts in found]


def _split_ties(numbers: Numbers, name: str, found: list[Narrowing], threads: int) -> tuple[Cut, ...]:
    """Turn thresholds into cuts that keep an exact number: scan for the last equal magnitude that survives."""
    size = numbers.sizes[name]
    cuts = [Cut(int(one.threshold or 0), NO_LIMIT) for one in found]

    def scan(which: int) -> Job:
        def run(scratch: Scratch) -> None:
            wanted = found[which].keep - found[which].above
            for start in range(0, size, BLOCK):
                stop = min(size, start + BLOCK)
                bits = scratch.get("bits", np.uint32, stop - start)
                _delta_bits(numbers, (name, start, stop), [which], scratch, lambda _: bits)  # noqa: B023 (used at once)
                ties = int(np.count_nonzero(bits == cuts[which].threshold))
                if ties >= wanted:
                    place = index_of_tie(bits, cuts[which].threshold, wanted)
                    last = stop - 1 if place == NO_LIMIT else start + place
                    cuts[which] = Cut(cuts[which].threshold, last)
                    return
                wanted -= ties

        return run

    run_jobs([scan(i) for i, one in enumerate(found) if one.equal > one.keep - one.above], threads)
    return tuple(cuts)
