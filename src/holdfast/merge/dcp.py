"""Distributed checkpoints (torch DCP, as FSDP writes them) read in stretches; no torch, and no pickle is run.

A DCP folder has a pickled ``.metadata`` and ``*.distcp`` files that hold one small zip archive per piece of a tensor.
Both pickles are read by an unpickler that knows a short list of harmless names and refuses everything else; numbers are
read from their place in the archive.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from holdfast.errors import UserError
from holdfast.merge.numbers import FROM_TORCH, Array, decode, itemsize, storage
from holdfast.merge.scratch import Scratch
from holdfast.merge.statedict import Files, TensorInfo

RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}  # fmt: skip


class Record:
    """Stands in for any of the metadata classes: keeps the fields it is given."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


def _flat_piece(storage_: Any, offset: int, size: Any, stride: Any, *_: Any) -> Record:
    return Record(storage_, offset, tuple(size), tuple(stride))


class Restricted(pickle.Unpickler):
    """Builds records, tuples, strings and numbers; any other name in the pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return Record
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch", "Size"): tuple,
            ("torch.serialization", "_get_layout"): str,
            ("torch._utils", "_rebuild_tensor_v2"): _flat_piece,
            ("collections", "OrderedDict"): dict,
            ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
            ("pathlib", "WindowsPath"): lambda *parts: "/".join(parts),
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and (name in FROM_TORCH or name.endswith("Storage")):
            return name
        raise UserError(f"the checkpoint's metadata names '{module}.{name}', which is not safe to load.")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class Slice(io.RawIOBase):
    """Part of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: its corner and size, and where its numbers lie."""

    corner: tuple[int, ...]
    size: tuple[int, ...]
    file: Path
    offset: int


def _locate(path: Path, start: int, length: int, size: tuple[int, ...]) -> int:
    """Absolute offset of a piece's numbers inside its zip archive; refuses compressed or strided ones."""
    with path.open("rb") as file:
        part = Slice(file, start, length)
        with zipfile.ZipFile(part) as archive:
            names = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            piece = Restricted(io.BytesIO(archive.read(names["data.pkl"]))).load()
            storage_, first, shape, stride = piece.values
            dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            relevant = [(a, b) for a, b, n in zip(stride, dense, shape) if n > 1]
            info = names[f"data/{storage_[2]}"]
            if info.compress_type or shape != size or any(a != b for a, b in relevant):
                raise UserError(f"{path}: holds a piece that is compressed or not contiguous.")
        part.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(part.read(4), "<u2").tolist()
        return start + info.header_offset + 30 + name_length + extra_length + first * itemsize(_dtype(storage_[1]))


def _dtype(storage_name: str) -> str:
    """``BFloat16Storage`` -> BF16."""
    kinds = {
        "BFloat16": "BF16", "Half": "F16", "Float": "F32", "Double": "F64", "Long": "I64", "Int": "I32", "Short": "I16",
        "Char": "I8", "Byte": "U8", "Bool": "BOOL",
    }  # fmt: skip
    return kinds.get(storage_name.removesuffix("Storage"), "U8")


class Distributed:
    """A DCP folder as a ``Source``."""

    def __init__(self, where: Path, infos: Mapping[str, TensorInfo], pieces: Mapping[str, list[Piece]]) -> None:
        self.where, self.infos, self._pieces = where, dict(infos), pieces
        self.files = [where / ".metadata", *sorted({piece.file for parts in pieces.values() for piece in parts})]
        self._files = Files()

    def raw(self, name: str, start: int, stop: int, out: Array) -> Array:
        """Elements start..stop as stored, put together from the pieces."""
        info = self.infos[name]
        width = itemsize(info.dtype)
        for piece in self._pieces[name]:
            for low, high, offset in _runs(piece, info.shape, start, stop):
                self._files.read(piece.file, piece.offset + offset * width, out[low - start : high - start])
        return out

    def numbers(self, name: str, start: int, stop: int, out: Array, scratch: Scratch) -> Array:
        """Elements start..stop decoded."""
        dtype = self.infos[name].dtype
        return decode(self.raw(name, start, stop, scratch.get("raw", storage(dtype), stop - start)), dtype, out)

    def ahead(self, name: str, start: int, stop: int) -> None:
        """Nothing: the pieces of a stretch lie in several files."""

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _runs(piece: Piece, shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of start..stop that lie in the piece without a gap: flat begin and end, and offset in the piece."""
    dims = len(shape)
    split = dims  # dimensions from here on are covered completely
    while split and piece.size[split - 1] == shape[split - 1]:
        split -= 1
    split = max(split - 1, 0)  # the innermost cut dimension still gives one run
    length = math.prod(piece.size[split:])
    strides = [math.prod(shape[i + 1 :]) for i in range(dims)]
    corner = sum(c * s for c, s in zip(piece.corner[split:], strides[split:]))
    outer = [range(c, c + n) for c, n in zip(piece.corner[:split], piece.size[:split])]
    for number, index in enumerate(itertools.product(*outer)):
        first = corner + sum(i * s for i, s in zip(index, strides))
        low, high = max(first, start), min(first + length, stop)
        if low < high:
            yield low, high, number * length + low - first


def open_dcp(folder: Path, like: Mapping[str, TensorInfo] | None) -> Distributed:
    """Open a DCP folder; a common prefix such as ``model.`` is dropped where that gives the names of ``like``."""
    with (folder / ".metadata").open("rb") as file:
        try:
            metadata = Restricted(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError):
            raise UserError(f"{folder / '.metadata'}: is not the metadata of a distributed checkpoint.") from None
    stored: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, place in metadata.storage_data.items():
        stored.setdefault(index.fqn, {})[tuple(index.offset or ())] = place
    infos, pieces = {}, {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            continue  # plain Python values: step counters and the like
        shape, dtype = tuple(entry.size), FROM_TORCH[entry.properties.values[0]]
        infos[name] = TensorInfo(name, dtype, shape, folder / ".metadata", 0)
        pieces[name] = [_piece(folder, chunk, stored[name]) for chunk in entry.chunks if math.prod(chunk.sizes)]
        if sum(math.prod(piece.size) for piece in pieces[name]) != infos[name].size:
            raise UserError(f"{folder}: pieces of tensor '{name}' are missing.")
    keep = _renamed(infos, like)
    if not keep:
        raise UserError(f"{folder}: holds no tensors of a model.")
    return Distributed(
        folder,
        {new: TensorInfo(new, infos[old].dtype, infos[old].shape, infos[old].file, 0) for new, old in keep.items()},
        {new: pieces[old] for new, old in keep.items()},
    )


def _piece(folder: Path, chunk: Any, places: Mapping[tuple[int, ...], Any]) -> Piece:
    corner, size = tuple(chunk.offsets), tuple(chunk.sizes)
    place = places[corner if corner in places else ()]
    if getattr(place, "transform_descriptors", None):
        raise UserError(f"{folder}: is compressed or encrypted ({place.transform_descriptors}).")
    path = folder / place.relative_path
    return Piece(corner, size, path, _locate(path, place.offset, place.length, size))


def _renamed(infos: Mapping[str, TensorInfo], like: Mapping[str, TensorInfo] | None) -> dict[str, str]:
    """New name -> stored name: the model's part of the checkpoint, named as in ``like`` if that is possible."""
    choices = []
    for prefix in ("", "model.", "module.", "state_dict.", "app.model."):
        choices.append({name.removeprefix(prefix): name for name in infos if name.startswith(prefix)})
    if like is not None:
        return max(choices, key=lambda names: len(names.keys() & like.keys()) - len(names.keys() - like.keys()))
    nested = {
        name: old for name, old in choices[1].items() if name.split(".")[0] in ("model", "lm_head", "transformer")
    }
    if nested and len(nested) == len(choices[1]):
        return choices[1]
    return choices[0]
