"""Where each row of a data set was read from, so that an error can name file and line."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

ATTRIBUTE = "_holdfast_origins"


class Origins:
    """File and line of every example: 8 bytes each. ``origins[i]`` is ``file:line``."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._file = array("l")
        self._number = array("q")

    def append(self, file: str, number: int) -> None:
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        self._file.append(len(self.files) - 1)
        self._number.append(number)

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, index: int) -> str:
        return f"{self.files[self._file[index]]}:{self._number[index]}"


def remember(dataset: Dataset, origins: Origins) -> Dataset:
    """Attach origins to a data set; sets derived from it (select, shuffle, map) have none."""
    setattr(dataset, ATTRIBUTE, origins)
    return dataset


def where(dataset: Dataset, index: int) -> str:
    """``file:line`` of an example if it is known, else its row in the data set."""
    origins: Origins | None = getattr(dataset, ATTRIBUTE, None)
    if origins is not None and len(origins) == len(dataset):
        return origins[index]
    return f"row {index + 1}"
