"""Running generated programs, only where the caller opted in: a separate process with hard limits.

The child runs in an empty temporary folder with an empty environment, without network (its own network namespace where
the kernel allows it, and everywhere an audit hook that refuses sockets and child processes), under limits on memory,
CPU time and file size, and its process group is killed at a wall-clock limit. That keeps accidents in, such as an
endless loop or a full disk. It is no wall against an attacker: for that, run inside a container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from holdfast.errors import UserError

_GUARD = """
import ctypes, resource, sys
def limit(which, value):
    try:
        resource.setrlimit(which, (value, value))
    except (ValueError, OSError):
        pass
try:
    ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000)  # new user and network namespaces
except Exception:
    pass
limit(resource.RLIMIT_AS, {memory})
limit(resource.RLIMIT_CPU, {cpu})
limit(resource.RLIMIT_FSIZE, {file_size})
limit(resource.RLIMIT_CORE, 0)
REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
           "ctypes.", "pty.", "webbrowser.", "ftplib.", "smtplib.", "urllib.")
def guard(event, arguments):
    if event.startswith(REFUSED):
        raise PermissionError("refused in the sandbox: " + event)
with open("program.py", encoding="utf-8") as file:
    program = compile(file.read(), "program.py", "exec")
sys.addaudithook(guard)
try:
    exec(program, {{"__name__": "__main__"}})
except SystemExit as error:
    raise RuntimeError("the program exited before its checks") from error
sys.exit({done})
"""
_DONE = 77  # only a program that came to its end leaves with this status


@dataclass(frozen=True)
class Sandbox:
    """Limits of one program: wall-clock seconds, memory and written bytes. Making one is the opt-in to run code."""

    seconds: float = 5.0
    memory: int = 1 << 30
    file_size: int = 1 << 20

    def run(self, program: str) -> str:
        """Run a Python program; "" if it ended well, else the last line of its error (or what stopped it)."""
        if os.name != "posix":
            raise UserError("generated programs can only be run on a POSIX system (Linux, macOS).")
        with tempfile.TemporaryDirectory(prefix="holdfast-sandbox-") as folder:
            Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
            guard = _GUARD.format(memory=self.memory, cpu=int(self.seconds) + 1, file_size=self.file_size, done=_DONE)
            errors = Path(folder, "errors.txt")  # a file, so that its limit holds for what is printed too
            with errors.open("wb") as file:
                child = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", guard],
                    cwd=folder,
                    env={"PYTHONIOENCODING": "utf-8"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    start_new_session=True,
                )
                try:
                    child.wait(timeout=self.seconds)
                except subprocess.TimeoutExpired:
                    return f"stopped after {self.seconds:g} s"
                finally:
                    _kill(child)
            lines = errors.read_bytes()[-4096:].decode("utf-8", "replace").strip().splitlines()
        if child.returncode == _DONE:
            return ""
        return lines[-1][:300] if lines else f"exit status {child.returncode}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def pass_at_k(passed: Sequence[int], samples: int, k: int) -> float:
    """Unbiased pass@k over problems: mean of 1 − C(n−c, k)/C(n, k), c of n samples passed (Chen et al. 2021, eq. 1)."""
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} needs at least {k} samples a problem, got {samples}.")
    if not passed:
        return float("nan")
    return sum(1.0 - comb(samples - c, k) / comb(samples, k) for c in passed) / len(passed)
