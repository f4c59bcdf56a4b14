"""The identity of a checkpoint: a hash of its tensors, whatever files they lie in."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import UserError
from holdfast.files import BLOCK


class Stored(NamedTuple):
    """Where one tensor's bytes lie."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int  # byte offset in the file
    size: int  # bytes


def weights_hash(folder: str | Path) -> str:
    """Hex SHA-256 over every tensor's name, type, shape and bytes, in the order of the names.

    Sharding, the order of tensors in the files and the files' metadata don't matter. A PEFT adapter's hash also
    covers its settings and the base model that it names. Cost: one read of the files, 1 MiB of memory.
    Raises UserError if the folder has no safetensors, or a damaged or duplicated tensor.
    """
    folder = Path(folder)
    seen: dict[str, Stored] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in _tensors(file):
            if tensor.name in seen:
                raise UserError(f"{folder}: '{tensor.name}' is stored in {seen[tensor.name].file.name} and {file.name}")
            seen[tensor.name] = tensor
    if not seen:
        raise UserError(f"{folder}: no tensors to hash (no *.safetensors)")
    total = hashlib.sha256()
    for name in sorted(seen):
        tensor = seen[name]
        total.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for block in _bytes(tensor):
            total.update(block)
    if (folder / "adapter_config.json").is_file():
        total.update(_adapter_identity(folder).encode())
    return total.hexdigest()


def _tensors(file: Path) -> Iterator[Stored]:
    """The header of a safetensors file: 8 bytes of length (little endian), then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size - 8:
                raise ValueError(f"its header claims {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"the tensor '{name}' lies outside the file")
            yield Stored(name, entry["dtype"], entry["shape"], file, 8 + length + start, end - start)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: a damaged safetensors file: {error}") from error


def _bytes(tensor: Stored) -> Iterator[bytes]:
    left = tensor.size
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        while left:
            block = stream.read(min(left, BLOCK))
            if not block:
                raise UserError(f"{tensor.file}: ends inside the tensor '{tensor.name}'")
            left -= len(block)
            yield block


def _adapter_identity(folder: Path) -> str:
    """The same A and B on another base, or with another scale, are other weights."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = settings.pop("base_model_name_or_path", None)
    at = Path(str(base)).expanduser()
    settings["base"] = weights_hash(at) if at.is_dir() else base
    return json.dumps(settings, sort_keys=True)
