"""Files that are either whole or absent, and the hashes that name them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # bytes read at a time when hashing


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest_ = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest_.update(block)
    return digest_.hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(value: Any, length: int = 16) -> str:
    """Short hex SHA-256 of a JSON-like value: the name of a content-addressed step."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def write_text(path: Path, text: str) -> None:
    """Write a file by renaming a complete temporary one over it; a crash leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` only if the block succeeds.

    On an exception (a full disk included) the temporary folder is removed and ``path`` is left as it was,
    so a folder under its final name is always complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
