"""measure on two ranks, plain, under DDP and with sharded weights (FSDP2), gives one process's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("evaluate_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(command: list[str], out: Path) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.distributed
def test_two_ranks_give_one_processs_numbers(tmp_path: Path) -> None:
    one = launched([sys.executable, str(WORKER), str(tmp_path / "one.json")], tmp_path / "one.json")["plain"]
    two = launched([*TORCHRUN, str(WORKER), str(tmp_path / "two.json"), "distributed"], tmp_path / "two.json")
    assert set(two) == {"plain", "ddp", "fsdp2"}
    for how, found in two.items():
        assert found["items"] == one["items"], how
        assert found["text"] == one["text"], how
        assert found["score"] == pytest.approx(one["score"], abs=1e-3), how
        for when in ("logprobs", "later"):
            for a, b in zip(found[when], one[when], strict=True):
                assert a == pytest.approx(b, abs=1e-4), (how, when)
    assert one["later"] != one["logprobs"][: len(one["later"])]
