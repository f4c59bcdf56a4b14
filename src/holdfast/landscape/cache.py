"""Finished points on disk, so that an interrupted scan continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor

from holdfast.files import canonical, digest, write_json
from holdfast.landscape.ranks import Ranks
from holdfast.landscape.weights import Mover


class PointCache:
    """One folder per scan, named by a digest of everything that decides its losses; one line per finished point.

    Each rank appends to its own file and reads everybody's. A line cut off by a crash is ignored. Losses are
    written so that they read back exactly.
    """

    def __init__(self, folder: str | Path | None, key: dict[str, Any], ranks: Ranks) -> None:
        self.folder = Path(folder) / digest(key) if folder is not None else None
        self.ranks = ranks
        self._key = key
        self._file: TextIO | None = None

    def __enter__(self) -> PointCache:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.ranks.rank == 0:
                write_json(self.folder / "scan.json", self._key)
            self._file = (self.folder / f"points-{self.ranks.rank}.jsonl").open("a", encoding="ascii")
            if self._file.tell():
                self._file.write("\n")  # ends a line that a crash cut off
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def known(self) -> dict[int, float]:
        """Losses of the points that are done, by point number; the same on every rank."""
        found: dict[int, float] = {}
        for path in sorted(self.folder.glob("points-*.jsonl")) if self.folder is not None else ():
            for line in path.read_text(encoding="ascii").split():
                try:
                    entry = json.loads(line)
                    found[int(entry["point"])] = float(entry["loss"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a crash
        return self.ranks.union(found)

    def add(self, point: int, loss: float) -> None:
        """Keep a finished point; on disk when this returns."""
        if self._file is not None and (self.ranks.split != "data" or self.ranks.rank == 0):
            self._file.write(canonical({"point": point, "loss": repr(loss)}) + "\n")
            self._file.flush()


def weights_digest(mover: Mover, ranks: Ranks) -> str:
    """Hex digest of the weights that are moved and those that are not, over all ranks."""
    whole = hashlib.sha256()
    moved = {cell.name for cell in mover.cells}
    for cell, home in zip(mover.cells, mover.home, strict=True):
        whole.update(f"{cell.name}{tuple(cell.shape)}{cell.start}".encode())
        _update(whole, home)
    for name, parameter in mover.model.named_parameters():
        if name not in moved:
            whole.update(name.encode())
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            _update(whole, local)
    return digest(ranks.agree(whole.hexdigest()) if ranks.split == "data" else whole.hexdigest())


def _update(digest_: Any, tensor: Tensor) -> None:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), 1 << 26):
        digest_.update(flat[start : start + (1 << 26)].cpu().numpy())
