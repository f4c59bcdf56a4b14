"""A checkpoint's tensors read lazily from safetensors files: one file, or shards with an index."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.errors import UserError
from holdfast.merge.numbers import STORAGE, TORCH_NAMES, Array, decode, itemsize, storage
from holdfast.merge.scratch import Scratch

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: safetensors dtype, shape, and the absolute byte offset in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * itemsize(self.dtype)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in file order) and metadata of one safetensors file; a damaged file raises ``UserError``."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
            header = json.loads(file.read(length)) if length <= MAX_HEADER else None
            total = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path}: is not a safetensors file (its header can't be read).")
    metadata = header.pop("__metadata__", {})
    infos = []
    for name, entry in header.items():
        if entry["dtype"] not in STORAGE:
            raise UserError(f"{path}: tensor '{name}' has dtype {entry['dtype']}, which can't be merged.")
        begin, end = entry["data_offsets"]
        info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin)
        if end - begin != info.nbytes or 8 + length + end > total:
            raise UserError(f"{path}: is damaged or cut short: tensor '{name}' does not fit in its {total:,} bytes.")
        infos.append(info)
    infos.sort(key=lambda info: info.offset)
    return {info.name: info for info in infos}, metadata


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in a folder, in the index's order."""
    index = folder / INDEX
    if not index.is_file():
        index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), index)
    if index.is_file():
        try:
            names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{index}: is not a shard index (no 'weight_map').") from None
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:
            raise UserError(f"{folder}: the index names {len(lost)} missing files: {', '.join(lost[:5])}.")
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise UserError(f"{folder}: holds {len(found)} safetensors files and no index; name one file.")
    if not found:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        hint = (
            f" It has {pickled[0].name}: save it as safetensors first (pickled weights are not read)."
            if pickled
            else ""
        )
        raise UserError(f"{folder}: no model.safetensors, shards or adapter here.{hint}")
    return found


class Files:
    """Open file descriptors, shared by threads, read by position."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        """Descriptor of a file, opened once."""
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def read(self, path: Path, offset: int, out: Array) -> None:
        """Fill a contiguous array with the file's bytes from ``offset`` on."""
        if not out.nbytes:
            return
        view, descriptor, done = out.data.cast("B"), self.descriptor(path), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise UserError(f"{path}: ended early: it was changed while being read.")
            done += count

    def ahead(self, path: Path, offset: int, length: int) -> None:
        """Ask the system to start reading a range that will be needed soon."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.descriptor(path), offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


class StateDict(Mapping[str, "torch.Tensor"]):
    """Lazy, read-only mapping from tensor names to torch tensors over a checkpoint's safetensors files.

    ``StateDict.open(folder_or_file)`` reads headers only. ``sd[name]`` reads one tensor; ``sd.numbers`` and ``sd.raw``
    read any stretch of it into numpy arrays without torch. Memory: what was asked for, nothing is cached or mapped.
    """

    def __init__(
        self, infos: Mapping[str, TensorInfo], files: list[Path], metadata: Mapping[str, str], where: Path
    ) -> None:
        self.infos = dict(infos)
        self.files = list(files)
        self.metadata = dict(metadata)
        self.where = where
        self._files = Files()

    @classmethod
    def open(cls, path: str | Path) -> StateDict:
        """Open a model folder or a single ``.safetensors`` file; raises ``UserError`` if there are no weights."""
        where = Path(path)
        if not where.exists():
            raise UserError(f"{where}: there is no such file or folder.")
        files = [where] if where.is_file() else weight_files(where)
        infos: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in files:
            found, extra = read_header(file)
            twice = found.keys() & infos.keys()
            if twice:
                raise UserError(f"{file}: tensor '{min(twice)}' is also in another shard.")
            infos.update(found)
            metadata.update(extra)
        return cls(infos, files, metadata, where)

    def raw(self, name: str, start: int, stop: int, out: Array) -> Array:
        """Elements start..stop as stored, into ``out`` (of the storage type, see ``numbers.storage``)."""
        info = self.infos[name]
        self._files.read(info.file, info.offset + start * itemsize(info.dtype), out)
        return out

    def numbers(self, name: str, start: int, stop: int, out: Array, scratch: Scratch) -> Array:
        """Elements start..stop decoded into ``out`` (float32 or float64)."""
        dtype = self.infos[name].dtype
        raw = self.raw(name, start, stop, scratch.get("raw", storage(dtype), stop - start))
        return decode(raw, dtype, out)

    def ahead(self, name: str, start: int, stop: int) -> None:
        """Start reading a stretch in the background."""
        info = self.infos[name]
        width = itemsize(info.dtype)
        self._files.ahead(info.file, info.offset + start * width, (stop - start) * width)

    def array(self, name: str) -> Array:
        """A whole tensor as a numpy array of its storage type (bfloat16 as uint16 bits)."""
        info = self.infos[name]
        return self.raw(name, 0, info.size, np.empty(info.size, storage(info.dtype))).reshape(info.shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        info = self.infos[name]
        out = torch.empty(info.shape, dtype=getattr(torch, TORCH_NAMES[info.dtype]))
        if info.size:
            self._files.read(info.file, info.offset, out.reshape(-1).view(torch.uint8).numpy())
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    # By identity: comparing contents would read whole checkpoints.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> StateDict:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
