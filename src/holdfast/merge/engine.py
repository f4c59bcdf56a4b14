"""The streaming loop: stretches of the inputs are read, merged and written in place, on all cores."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from holdfast.errors import UserError
from holdfast.merge.compare import Match
from holdfast.merge.formulas import Facts, Formula, Place, stretches
from holdfast.merge.layout import OutTensor, Shard
from holdfast.merge.numbers import Array, encode, itemsize, storage, working_type
from holdfast.merge.scratch import CHUNK, Job, Scratch, run_jobs
from holdfast.merge.sources import Source

BLOCK = 8 * CHUNK  # numbers of one job: the unit of resuming
Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass
class NonFinite:
    """NaN and infinite numbers of the inputs: an error, or collected if allowed."""

    allowed: bool
    found: dict[str, int] = field(default_factory=dict)  # "file: tensor" -> how many

    def check(self, values: Array, where: Path, name: str, start: int) -> None:
        """Raise (or note) if a stretch that was read holds NaN or inf."""
        if np.isfinite(values).all():
            return
        bad = np.flatnonzero(~np.isfinite(values))
        if not self.allowed:
            raise UserError(
                f"{where}: tensor '{name}' holds NaN or inf ({bad.size} from flat index {start + int(bad[0])} on); "
                "repair the checkpoint, or pass --allow-nonfinite to merge it as it is."
            )
        self.found[f"{where}: {name}"] = self.found.get(f"{where}: {name}", 0) + int(bad.size)


class StreamNumbers:
    """The merged part of every tensor of several sources, as a formula reads it."""

    def __init__(self, sources: Sequence[Source], match: Match, kinds: Mapping[str, str], nonfinite: NonFinite) -> None:
        self.sources, self.match = sources, match
        self.sizes = {name: size for name, size in match.merged.items() if size}
        self._working = {name: working_type(kinds[name]) for name in match.merged}
        self._nonfinite = nonfinite

    def read(self, which: int, name: str, start: int, stop: int, scratch: Scratch) -> Array:
        source = self.sources[which]
        there = self.match.aliases[which].get(name, name)
        out = scratch.get(f"in{which}", self._working[name], stop - start)
        source.numbers(there, start, stop, out, scratch)
        self._nonfinite.check(out, source.where, there, start)
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
        self,
        done: set[int],
        finish: Callable[[int], None],
        hashes: Mapping[Path, str],
        threads: int,
        progress: Progress | None,
    ) -> dict[Path, str]:
        """Do the jobs not yet done; returns SHA-256 by input file (those in ``hashes`` are taken as known)."""
        writer, found = Writer(self.outputs), dict(hashes)
        todo = list(enumerate(blocks(self.shards)))
        total = sum(self._bytes(block) for _, block in todo)
        written, lock = sum(self._bytes(block) for i, block in todo if i in done), threading.Lock()
        remaining = [(i, block) for i, block in todo if i not in done]
        lookahead = 2 * threads

        def job(position: int) -> Job:
            number, block = remaining[position]

            def run(scratch: Scratch) -> None:
                nonlocal written
                if position + lookahead < len(remaining):
                    self._ahead(remaining[position + lookahead][1])
                self._block(block, writer, scratch)
                finish(number)
                if progress:
                    with lock:
                        written += self._bytes(block)
                        progress(written, total)

            return run

        jobs = [job(position) for position in range(len(remaining))]
        run_jobs(self._with_hashing(jobs, found), threads)
        return found

    def _with_hashing(self, jobs: list[Job], found: dict[Path, str]) -> list[Job]:
        """Spread the hashing of input files evenly between the merging jobs, so that both find the pages in memory."""
        files = [path for source in dict.fromkeys((self.reference, *self.numbers.sources)) for path in source.files]
        todo = sorted({path for path in files if path not in found}, key=lambda path: path.name)
        every = max(1, len(jobs) // max(1, len(todo)))
        mixed: list[Job] = []
        for position in range(0, max(len(jobs), 1), every):
            if todo:
                mixed.append(_hash_job(todo.pop(0), found))
            mixed += jobs[position : position + every]
        return mixed + [_hash_job(path, found) for path in todo]

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
            if dtype == "F16" and not np.isfinite(raw).all() and not self.numbers._nonfinite.found:
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


def _hash_job(path: Path, found: dict[Path, str]) -> Job:
    def run(scratch: Scratch) -> None:
        digest, buffer = hashlib.sha256(), scratch.get("hashed", np.uint8, 1 << 20)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer.data):
                digest.update(buffer[:count].data)
        found[path] = digest.hexdigest()

    return run
