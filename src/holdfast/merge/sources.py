"""What a merge reads: a full checkpoint, an adapter on its base, or a distributed checkpoint, all by tensor name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from holdfast.errors import UserError
from holdfast.merge.numbers import Array
from holdfast.merge.scratch import Scratch
from holdfast.merge.statedict import StateDict, TensorInfo


class Source(Protocol):
    """Named tensors that can be read in stretches (see ``StateDict``, which is one)."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def where(self) -> Path: ...

    def raw(self, name: str, start: int, stop: int, out: Array) -> Array: ...

    def numbers(self, name: str, start: int, stop: int, out: Array, scratch: Scratch) -> Array: ...

    def ahead(self, name: str, start: int, stop: int) -> None: ...

    def close(self) -> None: ...


def open_checkpoint(path: str | Path, base: Source | None = None) -> Source:
    """Open a safetensors folder or file, a LoRA adapter folder (needs ``base``), or a DCP/FSDP folder.

    Raises ``UserError`` if the path holds none of these.
    """
    where = Path(path)
    if (where / "adapter_config.json").is_file():
        from holdfast.merge.adapters import open_adapter

        return open_adapter(where, base)
    if (where / ".metadata").is_file():
        from holdfast.merge.dcp import open_dcp

        return open_dcp(where, None if base is None else base.infos)
    return StateDict.open(where)


def same_bytes(one: tuple[Source, str], other: tuple[Source, str], scratch: Scratch) -> bool:
    """Do two tensors have the same dtype, shape and bytes? Reads until the first difference."""
    import numpy as np

    from holdfast.merge.numbers import itemsize

    first, second = (source.infos[name] for source, name in (one, other))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    width = itemsize(first.dtype)
    for start in range(0, first.size, 1 << 18):
        length = min(first.size - start, 1 << 18)
        mine, its = (
            source.raw(name, start, start + length, scratch.get(slot, np.uint8, length * width))
            for slot, (source, name) in zip(("one", "other"), (one, other))
        )
        if not np.array_equal(mine, its):
            return False
    return True


def local_base(folder: Path) -> Path:
    """The base folder that an adapter's config names, if it is a folder here; else ``UserError`` asks for one."""
    import json

    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if named and Path(named).is_dir():
        return Path(named)
    raise UserError(f"{folder}: is an adapter of '{named}', which is no folder here; give the base model with --base.")
