"""A key-value cache layer for decoding that does not copy the past at every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

STEP = 16  # tokens a buffer is made larger by, at least
GROWTH = 1.25


class Room(DynamicLayer):
    """Keys and values in a buffer with room to spare: appending a token copies that token, seldom the whole past.

    A full buffer grows by a quarter (at least ``STEP`` tokens, at most to ``capacity``), one layer at a time, so that
    texts which end early never take the memory of the longest.
    """

    def __init__(self, rows: int, capacity: int, trunk: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.rows, self.capacity, self.length, self.made = rows, capacity, 0, 0
        if trunk is not None:
            keys, values = trunk
            self.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; the keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = (
                state.new_empty((self.rows, state.shape[1], 0, state.shape[3])) for state in (key_states, value_states)
            )
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.made:
            more = max(self.length - self.made, STEP, int((GROWTH - 1) * self.made))
            self.made = min(self.capacity, self.made + more)
            self._keys = self._larger(self._keys, start)
            self._values = self._larger(self._values, start)
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
        return self.keys, self.values

    def _larger(self, held: Tensor, filled: int) -> Tensor:
        larger = held.new_empty((held.shape[0], held.shape[1], self.made, held.shape[3]))
        larger[:, :, :filled] = held[:, :, :filled]
        return larger

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
