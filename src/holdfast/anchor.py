"""Where θ₀ comes from: a copy kept in memory, or a checkpoint folder that is read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from holdfast.errors import UserError
from holdfast.tensors import Params, copies, local, shard_like


class Anchor(Protocol):
    """Reference weights θ₀ by parameter name."""

    def local(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of θ₀ for a parameter, on its device and in its dtype. Do not write to it."""
        ...


class Snapshot:
    """A copy of the weights as they are now. Cost: one (sharded) copy of the trainable weights."""

    def __init__(self, params: Params, device: str | None = None) -> None:
        made = copies(params.values()) if device is None else [local(p).to(device, copy=True) for p in params.values()]
        self._copies = dict(zip(params, made, strict=True))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Snapshot:
        """A snapshot from local parts made elsewhere (loaded from a checkpoint, say)."""
        snapshot = cls({})
        snapshot._copies = dict(tensors)
        return snapshot

    def local(self, name: str, like: Tensor) -> Tensor:
        target = local(like)
        return self._copies[name].to(device=target.device, dtype=target.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The local parts, for saving."""
        return dict(self._copies)


class Folder:
    """A checkpoint folder with safetensors, read one tensor at a time. Cost: no resident copy, one read per use.

    ``aliases`` gives the other names of tied parameters, because a file holds each of them under one name only.
    """

    def __init__(self, path: Path, aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        self.path = path
        self._aliases = aliases or {}
        self._files = weight_files(path)

    def local(self, name: str, like: Tensor) -> Tensor:
        return shard_like(self.full(name), like)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether the checkpoint has any of these tensors."""
        return any(known in self._files for name in names for known in self._known_as(name))

    def _known_as(self, name: str) -> list[str]:
        """A parameter's names in a file: its own, those of what it is tied to, and PEFT's without the adapter's."""
        return [name, *self._aliases.get(name, ()), name.replace(".default.", ".")]

    def full(self, name: str) -> Tensor:
        """The whole tensor on the CPU; UserError if the checkpoint has none of that name."""
        for known in self._known_as(name):
            if known in self._files:
                with safe_open(str(self._files[known]), framework="pt") as file:
                    return file.get_tensor(known)
        raise UserError(
            f"The anchor {self.path} holds no tensor '{name}'. It must be a checkpoint of the same model; "
            "for LoRA leave the anchor unset (the adapter as it is when training starts)."
        )


def weight_files(path: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a checkpoint folder (single file, shards with an index, or an adapter)."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (path / name).is_file():
            with safe_open(str(path / name), framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path / name))
    if not found:
        raise UserError(f"The anchor {path} is no checkpoint folder: no model.safetensors (or its index) in it.")
    return found


def aliases(model: torch.nn.Module) -> dict[str, list[str]]:
    """Names of parameters that share their storage with another: first name -> the others."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return {group[0]: group[1:] for group in names.values() if len(group) > 1}
