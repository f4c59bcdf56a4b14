"""The exact k-th largest magnitude of a stream, without sorting it and in bounded memory.

Magnitudes are compared as the bits of \\|x\\| in float32 (see ``numbers.magnitude_bits``). A stretch that fits in
memory is partitioned. A longer one is counted: a sample guesses a narrow interval of bit patterns, one pass counts what
lies above it and how often each pattern inside occurs. If the guess was wrong the counts say in which direction,
and another pass narrows what is left; the answer is exact either way.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from holdfast.merge.numbers import Array

BINS = 1 << 20
PENDING = 1 << 20  # bit patterns kept before they are counted
NO_LIMIT = np.iinfo(np.int64).max
TOP = 1 << 31


class Cut(NamedTuple):
    """What survives: bits above ``threshold``, and equal ones up to flat index ``last``."""

    threshold: int
    last: int

    def keep(self, bits: Array, start: int) -> Array:
        """Boolean mask for the stretch of the tensor that begins at flat index ``start``."""
        if start + bits.size - 1 <= self.last:
            return np.greater_equal(bits, self.threshold)
        if start > self.last:
            return np.greater(bits, self.threshold)
        kept = np.greater(bits, self.threshold)
        split = self.last - start + 1
        np.greater_equal(bits[:split], self.threshold, out=kept[:split])
        return kept


def kept_count(size: int, density: float) -> int:
    """Numbers kept of ``size``: int(density·size), at least 1."""
    return max(1, int(density * size)) if size else 0


def cut_in_memory(bits: Array, keep: int, split_ties: bool, spare: Array) -> Cut:
    """The cut that keeps ``keep`` of ``bits``; ``spare`` is an equally long array that is overwritten."""
    np.copyto(spare, bits)
    spare.partition(bits.size - keep)
    threshold = int(spare[bits.size - keep])
    if not split_ties:
        return Cut(threshold, NO_LIMIT)
    wanted = keep - int(np.count_nonzero(bits > threshold))
    return Cut(threshold, index_of_tie(bits, threshold, wanted))


def index_of_tie(bits: Array, threshold: int, wanted: int) -> int:
    """Position of the ``wanted``-th element equal to ``threshold`` (counted from 1)."""
    ties = np.flatnonzero(bits == threshold)
    return NO_LIMIT if ties.size == wanted else int(ties[wanted - 1])


class Narrowing:
    """One selection over a stream: feed every pass with ``add``, then ask ``settle`` if another pass is needed."""

    def __init__(self, size: int, keep: int, sample: Array | None = None) -> None:
        self.size, self.keep = size, keep
        self._floor, self._ceiling = 0, TOP  # proven: floor <= answer < ceiling
        self._low, self._high = self._guess(sample)
        self._lock = threading.Lock()
        self.threshold: int | None = None
        self.above = 0  # elements strictly above the threshold, once settled
        self.equal = 0
        self._reset()

    def _guess(self, sample: Array | None) -> tuple[int, int]:
        if sample is None or sample.size < 64:
            return self._floor, self._ceiling
        ordered, share = np.sort(sample), 1 - self.keep / self.size
        margin = (
            0.01 + 16 * (share * (1 - share) / sample.size) ** 0.5
        )  # neighbours are alike: 4 sigma, then doubled twice
        low = int(ordered[int(max(0.0, share - margin) * (sample.size - 1))]) if share > margin else 0
        high = int(ordered[int((share + margin) * (sample.size - 1))]) + 1 if share + margin < 1 else TOP
        return low, max(high, low + 1)

    def _reset(self) -> None:
        self._shift = max(0, (self._high - self._low - 1).bit_length() - BINS.bit_length() + 1)
        self._counts = np.zeros(((self._high - self._low - 1) >> self._shift) + 1, np.int64)
        self._above = 0
        self._pending: list[Array] = []
        self._waiting = 0

    def add(self, bits: Array) -> None:
        """Count one block; several threads may call this at once."""
        above = int(np.count_nonzero(bits >= self._high))
        key = bits - np.uint32(self._low)  # wraps far away for bits below low
        inside = key[key < np.uint32(self._high - self._low)]
        with self._lock:
            self._above += above
            self._pending.append(inside)
            self._waiting += inside.size
            if self._waiting > PENDING:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            keys = np.concatenate(self._pending) >> np.uint32(self._shift)
            self._counts += np.bincount(keys, minlength=self._counts.size)
        self._pending, self._waiting = [], 0

    def settle(self) -> bool:
        """After a full pass: True once ``threshold``, ``above`` and ``equal`` are exact."""
        self._flush()
        from_top = self._above + np.cumsum(self._counts[::-1])
        if self._above >= self.keep:
            self._floor = self._low = self._high
            self._high = self._ceiling
        elif not from_top.size or from_top[-1] < self.keep:
            self._ceiling = self._high = self._low
            self._low = self._floor
        else:
            place = int(np.searchsorted(from_top, self.keep))  # bins from the top
            found = self._counts.size - 1 - place
            low = self._low + (found << self._shift)
            if self._shift == 0:
                self.threshold, self.equal = low, int(self._counts[found])
                self.above = int(from_top[place]) - self.equal
                self._counts = np.zeros(0, np.int64)
                return True
            self._high = min(self._high, low + (1 << self._shift))
            self._low = low
            self._floor, self._ceiling = self._low, self._high
        self._reset()
        return False
