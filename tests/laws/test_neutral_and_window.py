"""Laws of every method: a neutral setting changes no bit, and how a window is split changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from tiny_world import Rows, arguments, distance, losses, same_bits, tiny_llama, train, weights

from holdfast import L2, SAM, SFA, Rehearsal, WiSEFT
from holdfast.methods import METHODS

NEUTRAL = {
    "sam": lambda: SAM(rho=0.0),
    "sfa": lambda: SFA(beta=0.0),
    "l2": lambda: L2(weight=0.0),
    "rehearsal": lambda: Rehearsal(share=0.0),
    "wiseft": lambda: WiSEFT(alpha=1.0),
}
ACTIVE = {
    "sam": lambda: SAM(rho=0.5),
    "sfa": lambda: SFA(p=0.5),
    "l2": lambda: L2(weight=1.0),
    "rehearsal": lambda: Rehearsal(share=0.25),
    "wiseft": lambda: WiSEFT(alpha=0.5),
}


def test_every_registered_method_is_under_the_laws() -> None:
    assert set(NEUTRAL) == set(ACTIVE) == set(METHODS)


def test_no_methods_is_the_plain_trainer(tmp_path: Path) -> None:
    plain = Trainer(model=tiny_llama(dropout=0.1), args=arguments(tmp_path), train_dataset=Rows())
    plain.train()
    hosted = train(tmp_path, model=tiny_llama(dropout=0.1))
    assert same_bits(weights(plain), weights(hosted))
    assert losses(plain) == losses(hosted)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("accumulation", [1, 2])
def test_neutral_setting_is_bit_identical(name: str, accumulation: int, tmp_path: Path) -> None:
    split = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    plain = train(tmp_path, model=tiny_llama(dropout=0.1), **split)
    neutral = train(tmp_path, [NEUTRAL[name]()], model=tiny_llama(dropout=0.1), **split)
    assert same_bits(weights(plain), weights(neutral))
    assert losses(plain) == losses(neutral)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_window_split_changes_nothing(name: str, tmp_path: Path) -> None:
    runs = []
    for accumulation in (1, 2, 4):
        split = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
        extra = {"memory": {"past": Rows(12, seed=5)}}
        runs.append(train(tmp_path, [ACTIVE[name]()], data=Rows(22), extra=extra, **split))
    for other in runs[1:]:
        assert distance(weights(runs[0]), weights(other)) <= 1e-6
        assert losses(runs[0]) == pytest.approx(losses(other), abs=1e-6)
    assert distance(weights(runs[0]), weights(train(tmp_path, data=Rows(22)))) > 1e-3  # the method did something
