"""Two processes, DDP and FSDP2 on CPU with gloo, equal one process, for every method."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from method_cases import ACTIVE, LONGER, ON_TEXT, RUNS
from safetensors.torch import load_file
from tiny_world import distance, euclidean, losses, tiny_llama, train_distributed, weights

pytestmark = pytest.mark.distributed


def plain_of(name: str) -> str:
    return "plain text" if name in ON_TEXT else "plain"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    folder, found = tmp_path_factory.mktemp("one"), {}
    for (name, (methods, on_text)), precision in itertools.product(RUNS.items(), ("fp32", "bf16")):
        found[name, precision] = train_distributed(
            folder / f"{name}-{precision}", methods(), on_text, precision, per_device_train_batch_size=4
        )
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all methods and both engines: starting Python is what costs."""
    out = tmp_path_factory.mktemp("two")
    tiny_llama().save_pretrained(out / "start")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "methods_worker.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(
    name: str, kind: str, one_process: dict[tuple[str, str], Any], two_processes: Path
) -> None:
    out = two_processes
    reference = one_process[name, "fp32"]
    found = json.loads((out / f"{kind}-fp32.json").read_text())[name]
    assert distance(weights(reference), load_file(out / f"{kind}-fp32-{name}.safetensors")) <= 1e-5
    assert found["losses"] == pytest.approx(losses(reference), abs=1e-5)
    for here, there in zip(reference.state.log_history, found["history"]):
        for key, value in here.items():
            if key.startswith("holdfast/") or key == "grad_norm":
                assert there[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    if name in ACTIVE:
        assert distance(weights(reference), weights(one_process[plain_of(name), "fp32"])) > 1e-3


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_two_processes_act_as_one_under_bf16_autocast(
    name: str, kind: str, one_process: dict[tuple[str, str], Any], two_processes: Path
) -> None:
    """Autocast rounds activations, and gradients before they are added: to a small part of what a method does."""
    found = load_file(two_processes / f"{kind}-bf16-{name}.safetensors")
    reference, plain = (weights(one_process[which, "bf16"]) for which in (name, plain_of(name)))
    assert euclidean(found, reference) < 0.25 * euclidean(reference, plain)


@pytest.mark.parametrize("name", sorted({*ACTIVE, *LONGER} - ON_TEXT))
def test_two_processes_resume_bit_for_bit(name: str, two_processes: Path) -> None:
    assert json.loads((two_processes / "resume.json").read_text())[name]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_perturbation_has_norm_rho_on_every_engine(kind: str, precision: str, two_processes: Path) -> None:
    """On two shards a norm of local parts would make it ρ·√2."""
    history = json.loads((two_processes / f"{kind}-{precision}.json").read_text())["sam"]["history"]
    assert [entry["holdfast/sam/realised_rho"] for entry in history] == pytest.approx([0.5] * len(history), rel=1e-4)
