"""The weights that a scan moves: their copies, moving them block by block, and putting them back bit for bit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from holdfast.errors import UserError

Scope = Literal["trainable", "all"]
CPU_BLOCK = 1 << 15  # elements; fits a core's cache with its copies, and stays below torch's own threading
DEVICE_BLOCK = 1 << 24


@dataclass(frozen=True)
class Cell:
    """The part of one parameter that lives on this rank, as a flat view of its storage.

    ``start`` is the view's place in the flattened whole tensor of ``shape``; ``row`` the length of one row, the
    unit of filter normalisation: a tensor's last axis, a whole kernel for convolutions, a whole vector for 1-D.
    """

    name: str
    view: Tensor
    shape: torch.Size
    start: int
    row: int

    @property
    def count(self) -> int:
        """Elements of the whole tensor, over all ranks."""
        return self.shape.numel()

    @property
    def work_dtype(self) -> torch.dtype:
        """Directions and sums are float32, or float64 for float64 weights."""
        return torch.float64 if self.view.dtype == torch.float64 else torch.float32

    @property
    def block(self) -> int:
        """Elements per block: whole rows, so that a block's noise doesn't depend on how a tensor is sharded."""
        size = CPU_BLOCK if self.view.device.type == "cpu" else DEVICE_BLOCK
        return max(1, size // self.row) * self.row

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(number, from, to) of every block that this rank holds a part of; places in the whole tensor."""
        end = self.start + self.view.numel()
        for number in range(self.start // self.block, -(-end // self.block)):
            low, high = number * self.block, (number + 1) * self.block
            yield number, max(low, self.start), min(high, end)


class Direction(Protocol):
    """One direction in weight space, read block by block."""

    def read(self, cell: Cell, number: int, low: int, high: int) -> Tensor:
        """The direction's elements ``low`` to ``high`` of the flattened tensor, inside block ``number``."""
        ...


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, whose wrappers change the parameters' names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def cells(model: nn.Module, scope: Scope = "trainable") -> list[Cell]:
    """The parameters to move, each storage once (a tied embedding is one parameter).

    ``trainable`` takes those with requires_grad (for a LoRA model: the adapters), ``all`` also the frozen ones.
    Raises UserError if there are none, or one is laid out in a way that can't be edited in place.
    """
    found: list[Cell] = []
    seen: set[tuple[torch.device, int, int]] = set()
    kernels = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or (scope == "trainable" and not parameter.requires_grad):
            continue
        local, start = _local(name, parameter)
        key = (local.device, local.data_ptr(), local.numel())
        if local.numel() and key in seen:
            continue
        seen.add(key)
        if not local.is_contiguous():
            raise UserError(f"parameter '{name}' is not contiguous in memory and can't be scanned in place")
        found.append(Cell(name, local.view(-1), parameter.shape, start, _row(parameter, id(parameter) in kernels)))
    if not found:
        hint = "; scope='all' also moves the frozen ones" if scope == "trainable" else ""
        raise UserError(f"the model has no {scope} floating-point parameters to move{hint}")
    return found


def _row(parameter: Tensor, kernel: bool) -> int:
    if parameter.ndim < 2:
        return max(1, parameter.numel())
    return parameter.shape[1:].numel() if kernel else parameter.shape[-1]


def _local(name: str, parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter and where it starts in the flattened whole."""
    if not is_sharded(parameter):
        return parameter.data, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = parameter.data
    for placement in sharded.placements:
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise UserError(f"parameter '{name}' is sharded as {placement}; only shards along the first axis work")
    _, offset = compute_local_shape_and_global_offset(parameter.shape, sharded.device_mesh, sharded.placements)
    inner = parameter.shape[1:].numel() if parameter.ndim else 1
    return sharded.to_local(), (offset[0] * inner if offset else 0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, so that this rank may hold only a part."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def reshard(model: nn.Module) -> None:
    """Make FSDP2 drop gathered weights: after a forward without backward edits to the shards would be lost."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Mover:
    """Moves a model's weights to θ + Σ cₖδₖ and puts θ back; holds the one copy of θ.

    On the CPU blocks are spread over torch's number of threads. Each point is computed from θ, never from the
    point before, so there is no drift.
    """

    def __init__(self, model: nn.Module, moved: list[Cell]) -> None:
        self.model = model
        self.cells = moved
        self.home = [cell.view.clone() for cell in moved]
        self.at_home = True
        on_cpu = all(cell.view.device.type == "cpu" for cell in moved)
        self._pool = ThreadPoolExecutor(torch.get_num_threads()) if on_cpu and torch.get_num_threads() > 1 else None

    def move(self, terms: Iterable[tuple[float, Direction]]) -> None:
        """Weights ← θ + Σ c·δ, in float32 (float64 for float64 weights), rounded once to the weights' type."""
        used = [(coefficient, direction) for coefficient, direction in terms if coefficient != 0.0]
        if not used:
            self.restore()
            return
        reshard(self.model)
        self.at_home = False

        def one(job: tuple[int, int, int, int]) -> None:
            index, number, low, high = job
            cell = self.cells[index]
            inside = slice(low - cell.start, high - cell.start)
            _add(cell, self.home[index][inside], cell.view[inside], used, number, low, high)

        jobs = [(index, *block) for index, cell in enumerate(self.cells) for block in cell.blocks()]
        self.each(one, jobs)

    @torch.no_grad()
    def each(self, work: Callable[[Any], None], jobs: list[Any]) -> None:
        """Run ``work`` on every job, on the threads if there are any; on return no thread touches the weights."""
        if self._pool is None:
            for job in jobs:
                work(job)
            return
        futures = [self._pool.submit(_batch, work, jobs[i : i + 64]) for i in range(0, len(jobs), 64)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Weights ← θ, by copy. Harmless to repeat."""
        reshard(self.model)
        for cell, home in zip(self.cells, self.home, strict=True):
            cell.view.copy_(home)
        self.at_home = True

    def close(self) -> None:
        """Wait for the threads, then put θ back: a thread still writing would undo the restoring."""
        with uninterrupted():
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = None
            self.restore()


@torch.no_grad()
def _batch(work: Callable[[Any], None], jobs: list[Any]) -> None:
    for job in jobs:
        work(job)


def _add(
    cell: Cell, home: Tensor, out: Tensor, terms: list[tuple[float, Direction]], number: int, low: int, high: int
) -> None:
    first, direction = terms[0]
    if out.dtype == cell.work_dtype:
        torch.add(home, direction.read(cell, number, low, high), alpha=first, out=out)
        for coefficient, direction in terms[1:]:
            out.add_(direction.read(cell, number, low, high), alpha=coefficient)
        return
    total = home.to(cell.work_dtype)
    for coefficient, direction in terms:
        total.add_(direction.read(cell, number, low, high), alpha=coefficient)
    out.copy_(total)


@contextmanager
def moving(model: nn.Module, scope: Scope = "trainable") -> Iterator[Mover]:
    """A Mover whose weights are back at θ when the block ends: normally, by an exception or by Ctrl-C.

    The model is in eval mode inside the block; each module's own mode is put back.
    """
    model = unwrapped(model)
    reshard(model)
    modes = [(module, module.training) for module in model.modules()]
    mover = Mover(model, cells(model, scope))
    try:
        model.eval()
        yield mover
    finally:
        mover.close()
        for module, mode in modes:
            module.training = mode


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C while the block runs, then let it act: a second one can't leave weights half restored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held and callable(previous):
            previous(*held[0])
