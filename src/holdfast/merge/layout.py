"""The output's files, known before a number is computed: headers, offsets and the shard index."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.merge.numbers import itemsize
from holdfast.merge.sources import Source
from holdfast.merge.statedict import TensorInfo

SHARD_BYTES = 5_000_000_000  # where the reference has no safetensors layout of its own


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the output: its dtype, and the absolute offset in its shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """One output file: header bytes (with their length prefix), tensors in file order, total bytes."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]
    nbytes: int


def shard(name: str, tensors: Sequence[TensorInfo], dtype: str | None, merged: Mapping[str, Any]) -> Shard:
    """Lay tensors out one after the other; floating ones take ``dtype`` if given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed, offset = [], 0
    for info in tensors:
        kind = dtype if dtype and info.name in merged else info.dtype
        size = info.size * itemsize(kind)
        entries[info.name] = {"dtype": kind, "shape": list(info.shape), "data_offsets": [offset, offset + size]}
        placed.append((info, kind, offset))
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    out = tuple(OutTensor(info.name, kind, info.shape, info.size, start + place) for info, kind, place in placed)
    return Shard(name, struct.pack("<Q", len(text)) + text, out, start + offset)


def layout(reference: Source, dtype: str | None, merged: Mapping[str, Any]) -> list[Shard]:
    """The reference's shards with its file names; a distributed checkpoint becomes safetensors shards of 5 GB."""
    groups: dict[str, list[TensorInfo]] = {}
    files = {info.file.suffix for info in reference.infos.values()}
    if files <= {".safetensors"}:
        for info in reference.infos.values():
            groups.setdefault(info.file.name, []).append(info)
        if len(groups) == 1:
            groups = {"model.safetensors": next(iter(groups.values()))}
    else:
        groups = _by_size(list(reference.infos.values()))
    return [shard(name, groups[name], dtype, merged) for name in sorted(groups)]


def _by_size(infos: Sequence[TensorInfo]) -> dict[str, list[TensorInfo]]:
    parts: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if parts[-1] and filled + info.nbytes > SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(info)
        filled += info.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def index(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Content of model.safetensors.index.json, or None for a single file."""
    if len(shards) == 1:
        return None
    total = sum(one.nbytes - len(one.header) for one in shards)
    weight_map = {tensor.name: one.name for one in shards for tensor in one.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def allocate(folder: Path, shards: Sequence[Shard]) -> None:
    """Create the files at their full length, with their headers."""
    for one in shards:
        with (folder / one.name).open("wb") as file:
            file.write(one.header)
            file.truncate(one.nbytes)
