"""Directions in weight space: seeded noise that can be drawn again at any time, and stored tensors."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from holdfast.errors import UserError, did_you_mean
from holdfast.landscape.weights import Cell, Direction, Mover, is_sharded

Kind = Literal["gaussian", "filter"]
KINDS = ("gaussian", "filter")


class _Scratch(threading.local):
    """Per thread and direction: a generator and a buffer, so that drawing a block allocates nothing."""

    def __init__(self) -> None:
        self.generators: dict[torch.device, torch.Generator] = {}
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


@dataclass(eq=False)
class Noise:
    """A Gaussian direction, a function of (seed, number, parameter name, block): the same on 1 process and on many.

    ``gaussian``: every element from N(0, 1), as in paper 1 (2406.04836, 2.1). ``filter``: after Li et al.
    (1712.09913, 4), each row scaled to the norm of the same row of θ. The rules: a row is the last axis of a
    matrix (an output neuron; for embeddings, tied or not, one token's vector) and a whole kernel of a
    convolution; a norm's gain and a bias are one row each; a row of zeros isn't moved.
    A direction is drawn again wherever it is needed and costs no memory but ``scales``, one number a row.
    """

    seed: int
    number: int
    kind: Kind = "gaussian"
    scales: dict[str, Tensor] = field(default_factory=dict)
    _scratch: _Scratch = field(default_factory=_Scratch, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of noise '{self.kind}'.{did_you_mean(self.kind, KINDS)}")

    def read(self, cell: Cell, number: int, low: int, high: int) -> Tensor:
        """Elements ``low`` to ``high``, drawn now; valid until this thread reads this direction again."""
        start = number * cell.block
        block = self._draw(cell, number)
        if self.kind == "filter":
            rows = slice(start // cell.row, start // cell.row + block.numel() // cell.row)
            block.view(-1, cell.row).mul_(self.scales[cell.name][rows, None])
        return block[low - start : high - start]

    def _draw(self, cell: Cell, number: int) -> Tensor:
        device = cell.view.device
        size = min(cell.block, cell.count - number * cell.block)
        key = (device, cell.work_dtype)
        buffer = self._scratch.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(max(size, cell.block), dtype=cell.work_dtype, device=device)
            self._scratch.buffers[key] = buffer
        generator = self._scratch.generators.get(device)
        if generator is None:
            generator = self._scratch.generators[device] = torch.Generator(device)
        # torch's CPU generator uses 32 bits of its seed: one start per tensor, consecutive blocks after it
        name = hashlib.sha256(f"{self.seed}/{self.number}/{cell.name}".encode()).digest()
        generator.manual_seed((int.from_bytes(name[:4], "big") + number) % 2**32)
        return buffer[:size].normal_(generator=generator)

    def prepare(self, mover: Mover) -> None:
        """Find the row scales of ``filter``, one pass over the noise; nothing to do for ``gaussian``."""
        if self.kind != "filter":
            return
        for index, cell in enumerate(mover.cells):
            noise, weight = self._row_squares(mover, index)
            if len(cell.shape) < 2:  # the one row may be cut by sharding
                sum_over_shards(mover, cell, weight)
            scale = torch.where(noise > 0, (weight / noise).sqrt(), 0.0)
            self.scales[cell.name] = scale.to(cell.work_dtype)

    def _row_squares(self, mover: Mover, index: int) -> tuple[Tensor, Tensor]:
        """Squared norms of the rows of the noise and of θ, block by block; rows of other ranks stay 0."""
        cell, home = mover.cells[index], mover.home[index]
        noise = torch.zeros(cell.count // cell.row, dtype=torch.float64, device=home.device)
        weight = torch.zeros_like(noise)

        def one(job: tuple[int, int, int]) -> None:
            number, low, high = job
            start, end = number * cell.block, min((number + 1) * cell.block, cell.count)
            drawn = self._draw(cell, number)[: end - start].view(-1, cell.row)
            noise[start // cell.row : end // cell.row] = _squares(drawn)
            part = home[low - cell.start : high - cell.start]
            if len(cell.shape) < 2:
                weight[0] += part.double().square().sum()
            else:
                weight[low // cell.row : high // cell.row] = _squares(part.view(-1, cell.row))

        mover.each(one, list(cell.blocks()))
        return noise, weight


def _squares(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


def sum_over_shards(mover: Mover, cell: Cell, value: Tensor) -> None:
    """Add up, in place, what the ranks that hold the shards of a parameter computed from their parts."""
    parameter = dict(mover.model.named_parameters())[cell.name]
    if is_sharded(parameter):
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        for axis, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=mesh.get_group(axis))


@dataclass(eq=False)
class Stored:
    """A direction kept as one flat tensor per parameter: this rank's part, in the order of the scan's cells."""

    parts: dict[str, Tensor]

    def read(self, cell: Cell, number: int, low: int, high: int) -> Tensor:
        return self.parts[cell.name][low - cell.start : high - cell.start]

    @classmethod
    def of(cls, direction: Direction, mover: Mover) -> Stored:
        """Keep a drawn direction: one more copy of the moved weights, nothing left to draw."""
        parts = {cell.name: torch.empty_like(cell.view, dtype=cell.work_dtype) for cell in mover.cells}

        def one(job: tuple[int, int, int, int]) -> None:
            index, number, low, high = job
            cell = mover.cells[index]
            parts[cell.name][low - cell.start : high - cell.start] = direction.read(cell, number, low, high)

        mover.each(one, [(i, *block) for i, cell in enumerate(mover.cells) for block in cell.blocks()])
        return cls(parts)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], mover: Mover) -> Stored:
        """A direction given as whole tensors by parameter name; each rank keeps its part.

        Raises UserError if a moved parameter is missing or has another shape.
        """
        parts: dict[str, Tensor] = {}
        for cell in mover.cells:
            if cell.name not in tensors:
                raise UserError(f"the direction has no tensor '{cell.name}'.{did_you_mean(cell.name, tensors)}")
            whole = tensors[cell.name]
            if whole.shape != cell.shape:
                raise UserError(f"'{cell.name}': direction of shape {tuple(whole.shape)}, weight {tuple(cell.shape)}")
            part = whole.reshape(-1)[cell.start : cell.start + cell.view.numel()]
            parts[cell.name] = part.to(dtype=cell.work_dtype, device=cell.view.device).clone()
        return cls(parts)


def products(mover: Mover, directions: list[Direction]) -> list[list[float]]:
    """Inner products of the directions with each other and, last, of θ with itself; float64, over all ranks."""
    n = len(directions)
    lock = threading.Lock()
    total = torch.zeros(n + 1, n + 1, dtype=torch.float64)

    def one(job: tuple[int, int, int, int]) -> None:
        index, number, low, high = job
        cell = mover.cells[index]
        home = mover.home[index][low - cell.start : high - cell.start]
        parts = [d.read(cell, number, low, high) for d in directions]
        found = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        for i in range(n):
            for j in range(i, n):
                found[i, j] = _dot(parts[i], parts[j])
        found[n, n] = _dot(home, home)
        with lock:
            total.add_(found)

    sharded = _sharded_group(mover)
    mover.each(one, [(i, *block) for i, cell in enumerate(mover.cells) for block in cell.blocks()])
    if sharded:
        device = mover.cells[0].view.device
        moved = total.to(device)
        torch.distributed.all_reduce(moved)
        total = moved.cpu() / sharded
    return (total + total.triu(1).T).tolist()


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.to(torch.float64), b.to(torch.float64)))


def _sharded_group(mover: Mover) -> int:
    """How often each element is counted when every rank adds its shards; 0 if nothing is sharded."""
    held = sum(cell.view.numel() for cell in mover.cells)
    whole = sum(cell.count for cell in mover.cells)
    if not any(is_sharded(p) for p in mover.model.parameters()):
        return 0
    counted = torch.tensor([float(held)], dtype=torch.float64, device=mover.cells[0].view.device)
    torch.distributed.all_reduce(counted)
    return max(1, round(float(counted) / whole))


def cosine(table: list[list[float]]) -> float:
    """Cosine of the first two directions of a table of inner products."""
    scale = math.sqrt(table[0][0] * table[1][1])
    return table[0][1] / scale if scale > 0 else 0.0


def noise_tensors(model: torch.nn.Module, *, seed: int = 0, number: int = 0, kind: Kind = "gaussian",
                  scope: Literal["trainable", "all"] = "trainable") -> dict[str, Tensor]:  # fmt: skip
    """The noise direction that ``surface`` uses, as whole tensors by parameter name (one copy of the weights).

    ``number`` is 0 for δ₁ and 1 for δ₂. For an unsharded model.
    """
    from holdfast.landscape.weights import moving

    with moving(model, scope) as mover:
        noise = Noise(seed, number, kind)
        noise.prepare(mover)
        stored = Stored.of(noise, mover)
        return {cell.name: stored.parts[cell.name].view(cell.shape) for cell in mover.cells}
