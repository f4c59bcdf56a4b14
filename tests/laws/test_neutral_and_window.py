"""Laws of every method: a neutral setting changes no bit, and how a window is split changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from method_cases import ACTIVE, NEUTRAL
from tiny_world import SGD_RUN, Rows, arguments, distance, losses, same_bits, tiny_llama, train, weights
from transformers import Trainer

from holdfast.methods import METHODS


def test_every_registered_method_is_under_the_laws() -> None:
    assert set(NEUTRAL) == set(ACTIVE) == set(METHODS)


def test_no_methods_is_the_plain_trainer(tmp_path: Path) -> None:
    plain = Trainer(model=tiny_llama(dropout=0.1), args=arguments(tmp_path), train_dataset=Rows())
    plain.train()
    hosted = train(tmp_path, model=tiny_llama(dropout=0.1))
    assert same_bits(weights(plain), weights(hosted))
    assert losses(plain) == losses(hosted)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_neutral_setting_is_bit_identical(name: str, tmp_path: Path) -> None:
    """With AdamW, dropout, weight decay, clipping and accumulation."""
    split = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    plain = train(tmp_path, model=tiny_llama(dropout=0.1), **split)
    neutral = train(tmp_path, [NEUTRAL[name]()], model=tiny_llama(dropout=0.1), **split)
    assert same_bits(weights(plain), weights(neutral))
    assert losses(plain) == losses(neutral)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_window_split_changes_nothing(name: str, tmp_path: Path) -> None:
    runs = []
    for accumulation in (1, 2, 4):
        split = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
        runs.append(train(tmp_path, [ACTIVE[name]()], **SGD_RUN, **split))
    for other in runs[1:]:
        assert distance(weights(runs[0]), weights(other)) <= 1e-6
        assert losses(runs[0]) == pytest.approx(losses(other), abs=1e-6)
    assert distance(weights(runs[0]), weights(train(tmp_path, **SGD_RUN))) > 1e-3  # the method did something
