"""The folder where a merge grows: hidden, resumable, and renamed to its name only when complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from types import TracebackType

from holdfast.errors import UserError
from holdfast.merge.publish import write_json

PATIENCE = 2.0  # seconds: the workers of a merge that was killed hold its lock until they are gone, too


def _boot() -> str:
    """Identity of this run of the operating system: after a power cut the journal can be ahead of the data."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Stage:
    """``.NAME.merging`` beside the output: ``result/`` with the files, ``journal`` with the finished jobs.

    A journal line is written after its job's data was handed to the operating system, so a process killed at any moment
    leaves a journal that can be trusted; after a reboot, or for another plan, the work starts afresh.
    """

    def __init__(self, out: Path, plan: str) -> None:
        self.out, self.plan = out, plan
        self.folder = out.parent / f".{out.name}.merging"
        self.result = self.folder / "result"
        self.done: set[int] = set()
        self.resumed = False
        self._journal = -1
        self._lock = -1

    def __enter__(self) -> Stage:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        wanted = {"plan": self.plan, "boot": _boot()}
        note = self.folder / "plan.json"
        found = self._noted(note)
        journal = self.folder / "journal"
        if found == wanted and self.result.is_dir():
            self.done = self._read(journal)
            self.resumed = True
        else:
            for path in (note, journal):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.result, ignore_errors=True)
            self.result.mkdir()
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self

    @staticmethod
    def _noted(note: Path) -> object:
        try:
            return json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @staticmethod
    def _read(journal: Path) -> set[int]:
        """Finished jobs; a last line that was cut short is removed."""
        if not journal.is_file():
            return set()
        text = journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        os.truncate(journal, len(whole))
        return {int(line) for line in whole.splitlines()}

    def _take_lock(self) -> None:
        import fcntl

        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > deadline:
                    os.close(self._lock)
                    raise UserError(f"{self.out}: another merge is writing this folder now.") from None
                time.sleep(0.02)

    def begin(self) -> None:
        """Every output file has its full length: from here on the journal counts."""
        write_json(self.folder / "plan.json", {"plan": self.plan, "boot": _boot()})

    def finish_job(self, number: int) -> None:
        """Note a job as done; its data must have been written."""
        os.write(self._journal, f"{number}\n".encode())

    def publish(self, overwrite: bool) -> None:
        """Give the complete folder its final name and remove the rest."""
        if self.out.exists():
            if not overwrite:
                raise UserError(f"{self.out}: appeared while merging; remove it or use --overwrite, then run again.")
            shutil.rmtree(self.out)
        self.result.replace(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        os.close(self._journal)
        os.close(self._lock)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, UserError):  # running it again can't help: leave nothing
            shutil.rmtree(self.folder, ignore_errors=True)
