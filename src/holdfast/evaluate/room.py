"""A key-value cache layer for decoding that does not copy the past at every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Room(DynamicLayer):
    """Keys and values in a buffer made once: appending a token copies that token, not the whole past."""

    def __init__(self, rows: int, capacity: int, trunk: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.rows, self.capacity, self.length = rows, capacity, 0
        if trunk is not None:
            keys, values = trunk
            self.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; the keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys = key_states.new_empty((self.rows, key_states.shape[1], self.capacity, key_states.shape[3]))
            self._values = value_states.new_empty(
                (self.rows, value_states.shape[1], self.capacity, value_states.shape[3])
            )
        start, self.length = self.length, self.length + key_states.shape[2]
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
