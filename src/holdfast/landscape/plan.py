"""Whether a scan keeps its directions in memory or draws them again at every point."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from holdfast.errors import UserError
from holdfast.landscape.weights import Cell

log = logging.getLogger("holdfast.landscape")
Memory = Literal["auto", "stored", "regenerated"]
SHARE = 0.6  # of the free memory that copies of the weights may take; the rest is for activations


@dataclass(frozen=True)
class Plan:
    """How directions are held. ``copies``: extra copies of the moved weights in memory, θ itself included."""

    memory: str
    copies: int
    bytes_per_copy: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """For a surface's meta data."""
        return asdict(self)


def plan(cells: Sequence[Cell], memory: Memory = "auto", directions: int = 2) -> Plan:
    """Choose stored directions (1 + n copies of the weights) where they fit, else regenerated ones (1 copy).

    Stored directions cost nothing per point; regenerated ones are drawn from the seed at every point. Both give
    the same surface to the last bit. The choice and its reason are logged. Raises UserError for an unknown mode.
    """
    if memory not in ("auto", "stored", "regenerated"):
        raise UserError(f"memory must be auto, stored or regenerated, not '{memory}'")
    size = sum(cell.view.numel() * max(cell.view.element_size(), 4) for cell in cells)
    free = free_bytes(cells[0].view.device)
    if memory != "auto":
        chosen, reason = memory, "asked for"
    elif free is None:
        chosen, reason = "stored", "free memory unknown"
    else:
        fits = (1 + directions) * size <= SHARE * free
        chosen = "stored" if fits else "regenerated"
        reason = f"{(1 + directions) * size / 1e9:.2f} GB {'fit' if fits else 'do not fit'} in {free / 1e9:.2f} GB free"
    made = Plan(chosen, 1 + directions if chosen == "stored" else 1, size, reason)
    log.info("directions %s: %d extra copies of the weights, %.2f GB (%s)", chosen, made.copies,
             made.copies * size / 1e9, reason)  # fmt: skip
    return made


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device, in bytes; None where that can't be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
