"""The same seed gives the same surface on one process and on two ranks: points split, data split, DDP, FSDP2."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "landscape_worker.py"


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("landscape_worker", WORKER)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker.measure("plain", "auto", None)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(WORKER),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((out / "results.json").read_text())
    found["points per rank"] = [
        len(path.read_text().split()) for path in sorted(out.glob("cache-ddp-auto/*/points-*.jsonl"))
    ]
    return found


@pytest.mark.parametrize("way", ["plain/data", "ddp/auto", "fsdp2/auto"])
def test_two_ranks_measure_what_one_process_measures(way: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    found = together["results"][way]
    assert found["restored"]
    for name in ("gaussian-stored", "gaussian-regenerated", "filter-stored", "filter-regenerated"):
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-6, err_msg=name)
    for name in ("gaussian-norms", "filter-norms"):
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-6, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(found["sharpness"], alone["sharpness"], rtol=2e-4, atol=1e-6)
    if "eigenvalue" in found:
        np.testing.assert_allclose(found["eigenvalue"], alone["eigenvalue"], rtol=2e-2)


def test_every_rank_returns_the_same(together: dict[str, Any]) -> None:
    assert together["equal"]


def test_points_are_shared_out_and_none_is_done_twice(together: dict[str, Any]) -> None:
    # gaussian and filter, 9 points each; the second memory mode finds all points finished
    assert sorted(together["points per rank"]) == [4, 4, 5, 5]
