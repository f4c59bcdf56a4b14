"""LoRA adapters as full checkpoints: effective weights W = W₀ + s·B·A, computed stretch by stretch.

An average of A and B is not the average of B·A, so adapters are always merged as effective weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import UserError
from holdfast.merge.numbers import Array, decode
from holdfast.merge.scratch import Scratch
from holdfast.merge.sources import Source, local_base, open_checkpoint
from holdfast.merge.statedict import StateDict, TensorInfo

PREFIX = "base_model.model."
PAIRS = (
    ("lora_A.weight", "lora_B.weight", False),
    ("lora_embedding_A", "lora_embedding_B", True),  # the embedding's update is (B·A)ᵀ
)


@dataclass(frozen=True)
class LowRank:
    """One update: ``left`` (rows, r) times ``right`` (r, columns), already scaled; ``magnitude`` per row for DoRA."""

    left: Array
    right: Array
    magnitude: Array | None = None


class Adapter:
    """A ``Source`` with the base's names and shapes and the adapter's effective weights.

    Besides the stretch asked for, it holds the adapter's own matrices in float32.
    """

    def __init__(
        self, where: Path, base: Source, own: StateDict, updates: Mapping[str, LowRank], whole: Mapping[str, str]
    ) -> None:
        self.where, self.base, self.own = where, base, own
        self.updates, self.whole = updates, whole
        self.infos: dict[str, TensorInfo] = {**base.infos, **{name: own.infos[there] for name, there in whole.items()}}
        self.files = [*own.files, *base.files]

    def raw(self, name: str, start: int, stop: int, out: Array) -> Array:
        """Bytes as stored; updated tensors have none of their own, so they are never asked for."""
        if name in self.whole:
            return self.own.raw(self.whole[name], start, stop, out)
        assert name not in self.updates
        return self.base.raw(name, start, stop, out)

    def numbers(self, name: str, start: int, stop: int, out: Array, scratch: Scratch) -> Array:
        """Effective weights start..stop, flattened."""
        update = self.updates.get(name)
        if update is None:
            return self._before(name, start, stop, out, scratch)
        columns = update.right.shape[1]
        first, last = start // columns, -(-stop // columns)
        inside = slice(start - first * columns, stop - first * columns)
        if update.magnitude is None:
            self._before(name, start, stop, out, scratch)
            delta = update.left[first:last] @ update.right
            return np.add(out, delta.reshape(-1)[inside], out=out)
        rows = np.empty((last - first) * columns, out.dtype)
        self._before(name, first * columns, last * columns, rows, scratch)
        matrix = rows.reshape(-1, columns)
        matrix += update.left[first:last] @ update.right
        matrix *= (update.magnitude[first:last] / np.sqrt(np.square(matrix).sum(1)))[:, None]
        np.copyto(out, rows[inside])
        return out

    def _before(self, name: str, start: int, stop: int, out: Array, scratch: Scratch) -> Array:
        """The weights that the update is added to: the base's, unless the adapter brings its own."""
        if name in self.whole:
            return self.own.numbers(self.whole[name], start, stop, out, scratch)
        return self.base.numbers(name, start, stop, out, scratch)

    def ahead(self, name: str, start: int, stop: int) -> None:
        """Start reading the base's stretch."""
        if name not in self.whole:
            self.base.ahead(name, start, stop)

    def close(self) -> None:
        """Close the adapter's own files; the base has its own owner."""
        self.own.close()


def open_adapter(folder: Path, base: Source | None) -> Adapter:
    """Open a PEFT LoRA folder (also rsLoRA, DoRA, per-module ranks and alphas, saved modules) on its base.

    Raises ``UserError`` for other adapter types and for updates that fit no tensor of the base.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: adapters of type {config.get('peft_type')} can't be merged, only LORA.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: has no adapter_model.safetensors.")
    root = base if base is not None else open_checkpoint(local_base(folder))
    own = StateDict.open(folder / "adapter_model.safetensors")
    updates, whole, unknown = {}, {}, []
    for name in own.infos:
        stem = name.removeprefix(PREFIX)
        pair = next((pair for pair in PAIRS if stem.endswith("." + pair[0])), None)
        if pair:
            module = stem.removesuffix("." + pair[0])
            updates[_base_name(f"{module}.weight", root, folder)] = _update(own, root, config, module, pair, folder)
        elif not any(stem.endswith(pair[1]) for pair in PAIRS) and "lora_magnitude_vector" not in stem:
            if "lora_" in stem:
                unknown.append(stem)
            else:
                whole[_base_name(stem.replace(".base_layer.", "."), root, folder)] = name
    if unknown:
        raise UserError(f"{folder}: holds tensors that can't be merged: {', '.join(unknown[:5])}.")
    return Adapter(folder, root, own, updates, whole)


def _base_name(name: str, base: Source, folder: Path) -> str:
    """The base's name for an adapted tensor: the same, or the only one that ends with it (or that it ends with)."""
    if name in base.infos:
        return name
    near = [known for known in base.infos if known.endswith("." + name) or name.endswith("." + known)]
    if len(near) != 1:
        raise UserError(f"{folder}: adapts '{name}', which {base.where} does not have.")
    return near[0]


def _update(
    own: StateDict, base: Source, config: Mapping[str, Any], module: str, pair: tuple[str, str, bool], folder: Path
) -> LowRank:
    first, second, transposed = pair
    a = _matrix(own, f"{PREFIX}{module}.{first}")
    b = _matrix(own, f"{PREFIX}{module}.{second}")
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    scale = _scale(config, module, a.shape[0])
    flip = transposed or bool(config.get("fan_in_fan_out"))
    left, right = (a.T * scale, b.T) if flip else (b * scale, a)
    info = base.infos[_base_name(f"{module}.weight", base, folder)]
    if left.shape[0] * right.shape[1] != info.size:
        raise UserError(
            f"{folder}: the update of '{module}' has shape {left.shape[0], right.shape[1]}, its base {info.shape}."
        )
    name = f"{PREFIX}{module}.lora_magnitude_vector"
    stored = next((known for known in (name, name + ".weight") if known in own.infos), None)
    if stored is None:
        return LowRank(np.ascontiguousarray(left), np.ascontiguousarray(right))
    if flip or len(info.shape) != 2:
        raise UserError(f"{folder}: DoRA on '{module}' can't be merged (only on linear layers).")
    return LowRank(np.ascontiguousarray(left), np.ascontiguousarray(right), _matrix(own, stored).reshape(-1))


def _matrix(own: StateDict, name: str) -> Array:
    info = own.infos[name]
    return decode(own.array(name).reshape(-1), info.dtype, np.empty(info.size, np.float32)).reshape(info.shape)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha/r, or alpha/√r for rsLoRA; alpha may differ by module."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
