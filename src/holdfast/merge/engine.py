"""The streaming loop: stretches of the inputs are read, merged and written in place, on all cores."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import UserError
from holdfast.merge.compare import Match
from holdfast.merge.formulas import Facts, Formula, Place, stretches
from holdfast.merge.layout import OutTensor, Shard
from holdfast.merge.numbers import Array, encode, finite, itemsize, storage, working_type
from holdfast.merge.processes import Task, run_tasks
from holdfast.merge.scratch import CHUNK, Scratch
from holdfast.merge.sources import Source

BLOCK = 8 * CHUNK  # numbers of one job: the unit of resuming
Progress = Callable[[int, int], None]  # bytes written, bytes in all


def check_finite(values: Array, allowed: bool, where: Path, name: str, start: int, scratch: Scratch) -> None:
    """NaN and inf in a stretch that was read are an error, or are counted in ``scratch.nonfinite`` if allowed."""
    if finite(values):
        return
    bad = np.flatnonzero(~np.isfinite(values))
    if not allowed:
        raise UserError(
            f"{where}: tensor '{name}' holds NaN or inf ({bad.size} from flat index {start + int(bad[0])} on); "
            "repair the checkpoint, or pass --allow-nonfinite to merge it as it is."
        )
    place = f"{where}: {name}"
    scratch.nonfinite[place] = scratch.nonfinite.get(place, 0) + int(bad.size)


class StreamNumbers:
    """The merged part of every tensor of several sources, as a formula reads it."""

    def __init__(
        self, sources: Sequence[Source], match: Match, kinds: Mapping[str, str], allow_nonfinite: bool = False
    ) -> None:
        self.sources, self.match = sources, match
        self.sizes = {name: size for name, size in match.merged.items() if size}
        self._working = {name: working_type(kinds[name]) for name in match.merged}
        self._allow_nonfinite = allow_nonfinite

    def read(self, which: int, name: str, start: int, stop: int, scratch: Scratch) -> Array:
        source = self.sources[which]
        there = self.match.aliases[which].get(name, name)
        out = scratch.get(f"in{which}", self._working[name], stop - start)
        source.numbers(there, start, stop, out, scratch)
        check_finite(out, self._allow_nonfinite, source.where, there, start, scratch)
        return out

    def ahead(self, which: int, name: str, start: int, stop: int) -> None:
        """Start reading in the background."""
        self.sources[which].ahead(self.match.aliases[which].get(name, name), start, stop)


@dataclass(frozen=True)
class Output:
    """One result: where its shards lie and the formula that makes it."""

    folder: Path
    formula: Formula
    facts: Facts


@dataclass(frozen=True)
class Block:
    """One job: elements start..stop of a tensor of a shard."""

    shard: Shard
    tensor: OutTensor
    start: int
    stop: int


def blocks(shards: Sequence[Shard]) -> list[Block]:
    """All jobs, in file order."""
    return [
        Block(one, tensor, *part) for one in shards for tensor in one.tensors for part in stretches(tensor.size, BLOCK)
    ]


class Writer:
    """Writes into the output files by position, from several threads; opening anew needs no limit on open files."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._folders = [output.folder for output in outputs]

    def write(self, which: int, block: Block, start: int, raw: Array) -> None:
        """Write ``raw`` (storage type) as the tensor's elements from ``start`` on."""
        view, done = raw.data.cast("B"), 0
        offset = block.tensor.offset + start * itemsize(block.tensor.dtype)
        descriptor = os.open(self._folders[which] / block.shard.name, os.O_WRONLY)
        try:
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)
        finally:
            os.close(descriptor)


class Engine:
    """Runs the jobs of one merge (or of one sweep: several outputs from one pass over the inputs)."""

    def __init__(
        self, reference: Source, numbers: StreamNumbers, outputs: Sequence[Output], shards: Sequence[Shard]
    ) -> None:
        self.reference, self.numbers, self.outputs, self.shards = reference, numbers, outputs, shards
        self._used = sorted({i for output in outputs for i in output.formula.used()})
        self._equal = set(numbers.match.equal)

    def run(
        self, done: set[int], finish: Callable[[int], None], threads: int, progress: Progress | None
    ) -> tuple[dict[Path, str], dict[str, int]]:
        """Do the jobs not yet done; returns SHA-256 by input file, and NaN and inf by "file: tensor" where allowed."""
        writer, hashes, nonfinite = Writer(self.outputs), dict[Path, str](), Counter[str]()
        every = list(enumerate(blocks(self.shards)))
        total = sum(self._bytes(block) for _, block in every)
        written = sum(self._bytes(block) for number, block in every if number in done)
        remaining = [(number, block) for number, block in every if number not in done]
        lookahead = 2 * threads

        def merging(position: int) -> Task:
            _, block = remaining[position]

            def run(scratch: Scratch) -> dict[str, int]:
                if position + lookahead < len(remaining):
                    self._ahead(remaining[position + lookahead][1])
                scratch.nonfinite = {}
                self._block(block, writer, scratch)
                return scratch.nonfinite

            return run

        order = self._order(len(remaining))

        def receive(index: int, result: Any) -> None:
            nonlocal written
            what = order[index]
            if isinstance(what, Path):
                hashes[what] = result
                return
            number, block = remaining[what]
            nonfinite.update(result)
            finish(number)
            if progress:
                written += self._bytes(block)
                progress(written, total)

        tasks = [hashing(what) if isinstance(what, Path) else merging(what) for what in order]
        run_tasks(tasks, threads, receive)
        return hashes, dict(nonfinite)

    def _order(self, merges: int) -> list[int | Path]:
        """Merging jobs by position, input files to hash spread evenly between them: both find the pages in memory."""
        files = [path for source in dict.fromkeys((self.reference, *self.numbers.sources)) for path in source.files]
        todo = sorted(set(files), key=lambda path: path.name)
        every = max(1, merges // max(1, len(todo)))
        mixed: list[int | Path] = []
        for position in range(0, max(merges, 1), every):
            if todo:
                mixed.append(todo.pop(0))
            mixed += range(position, min(position + every, merges))
        return mixed + todo

    def _bytes(self, block: Block) -> int:
        return (block.stop - block.start) * itemsize(block.tensor.dtype) * len(self.outputs)

    def _ahead(self, block: Block) -> None:
        if block.tensor.name in self.numbers.sizes:
            for which in self._used:
                self.numbers.ahead(which, block.tensor.name, block.start, block.stop)

    def _block(self, block: Block, writer: Writer, scratch: Scratch) -> None:
        name = block.tensor.name
        merged = self.numbers.match.merged.get(name, 0)
        for low, high in stretches(block.stop - block.start, CHUNK):
            start, stop = block.start + low, block.start + high
            middle = min(max(merged, start), stop)
            if start < middle:
                self._merge(block, start, middle, writer, scratch)
            if middle < stop:
                self._copy(block, middle, stop, writer, scratch)

    def _merge(self, block: Block, start: int, stop: int, writer: Writer, scratch: Scratch) -> None:
        name, dtype = block.tensor.name, block.tensor.dtype
        inputs: list[Array | None] = [None] * len(self.numbers.sources)
        for which in self._used:
            inputs[which] = self.numbers.read(which, name, start, stop, scratch)
        carry = scratch.get("carry", np.float32, stop - start)
        for i, output in enumerate(self.outputs):
            values = output.formula.apply(Place(name, start), inputs, output.facts, scratch)
            raw = encode(values, dtype, scratch.get("encoded", storage(dtype), stop - start), carry)
            if dtype == "F16" and not np.isfinite(raw).all() and not scratch.nonfinite:
                raise UserError(f"tensor '{name}': the merged numbers are too large for float16; use --dtype float32.")
            writer.write(i, block, start, raw)

    def _copy(self, block: Block, start: int, stop: int, writer: Writer, scratch: Scratch) -> None:
        name, match = block.tensor.name, self.numbers.match
        dtype = self.reference.infos[name].dtype
        raw = self.reference.raw(name, start, stop, scratch.get("copied", storage(dtype), stop - start))
        if name in self._equal:
            for source, alias in zip(self.numbers.sources[: match.compared], match.aliases):
                other = source.raw(
                    alias.get(name, name), start, stop, scratch.get("other", storage(dtype), stop - start)
                )
                if not np.array_equal(raw.view(np.uint8), other.view(np.uint8)):
                    raise UserError(
                        f"tensor '{name}' ({dtype}) differs between {self.reference.where} and {source.where}."
                    )
        if dtype != block.tensor.dtype:
            values = self.reference.numbers(
                name, start, stop, scratch.get("total", working_type(block.tensor.dtype), stop - start), scratch
            )
            raw = encode(values, block.tensor.dtype, scratch.get("encoded", storage(block.tensor.dtype), stop - start))
        for i in range(len(self.outputs)):
            writer.write(i, block, start, raw)


def hashing(path: Path) -> Task:
    """Task whose result is the file's SHA-256."""

    def run(scratch: Scratch) -> str:
        digest, buffer = hashlib.sha256(), scratch.get("hashed", np.uint8, 1 << 20)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer.data):
                digest.update(buffer[:count].data)
        return digest.hexdigest()

    return run
