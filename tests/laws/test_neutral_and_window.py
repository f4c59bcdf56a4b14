"""Laws of every method: a neutral setting changes no bit, and how a window is split changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from method_cases import ACTIVE, NEUTRAL, ON_TEXT
from tiny_world import (
    SGD_RUN,
    Rows,
    arguments,
    distance,
    euclidean,
    losses,
    same_bits,
    tiny_llama,
    train,
    train_text,
    weights,
)
from transformers import Trainer

from holdfast.methods import METHODS

NEUTRAL_RUN: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
SPLITS = [{"gradient_accumulation_steps": n, "per_device_train_batch_size": 4 // n} for n in (1, 2, 4)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Training without methods, with the settings of the laws below."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        "fp32": train(folder, model=tiny_llama(dropout=0.1), **NEUTRAL_RUN),
        "bf16": train(folder, model=tiny_llama(dropout=0.1), bf16=True, **NEUTRAL_RUN),
        "sgd": train(folder, **SGD_RUN),
    }


def test_every_registered_method_is_under_the_laws() -> None:
    assert set(NEUTRAL) == set(ACTIVE) == set(METHODS)


def test_no_methods_is_the_plain_trainer(tmp_path: Path, plain: dict[str, Any]) -> None:
    trainer = Trainer(model=tiny_llama(dropout=0.1), args=arguments(tmp_path, **NEUTRAL_RUN), train_dataset=Rows())
    trainer.train()
    assert same_bits(weights(trainer), weights(plain["fp32"]))
    assert losses(trainer) == losses(plain["fp32"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - ON_TEXT))
def test_neutral_setting_is_bit_identical(name: str, precision: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    """With AdamW, dropout, weight decay, clipping and accumulation; in fp32 and under bf16 autocast."""
    model = tiny_llama(dropout=0.1)
    neutral = train(tmp_path, [NEUTRAL[name]()], model=model, bf16=precision == "bf16", **NEUTRAL_RUN)
    assert same_bits(weights(plain[precision]), weights(neutral))
    assert losses(plain[precision]) == losses(neutral)


@pytest.mark.parametrize("name", sorted(set(METHODS) - ON_TEXT))
def test_window_split_changes_nothing(name: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    runs = [train(tmp_path, [ACTIVE[name]()], **SGD_RUN, **split) for split in SPLITS]
    for other in runs[1:]:
        assert distance(weights(runs[0]), weights(other)) <= 1e-6
        assert losses(runs[0]) == pytest.approx(losses(other), abs=1e-6)
    assert distance(weights(runs[0]), weights(plain["sgd"])) > 1e-3  # the method did something


@pytest.mark.parametrize("name", sorted(set(METHODS) - ON_TEXT))
def test_acts_alike_under_bf16_autocast(name: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    """Autocast rounds activations, not weights: a method's effect has the size it has in fp32."""
    full = train(tmp_path, [ACTIVE[name]()], **SGD_RUN)
    half = train(tmp_path, [ACTIVE[name]()], bf16=True, **SGD_RUN)
    effect = euclidean(weights(full), weights(plain["sgd"]))
    assert euclidean(weights(half), weights(full)) < 0.3 * effect


@pytest.mark.parametrize("name", sorted(ON_TEXT))
def test_laws_of_methods_that_need_text(name: str, tmp_path: Path) -> None:
    plain, neutral = train_text(tmp_path), train_text(tmp_path, [NEUTRAL[name]()])
    assert same_bits(weights(plain), weights(neutral))
    whole, parts = (train_text(tmp_path, [ACTIVE[name]()], **split) for split in SPLITS[:2])
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)
    assert distance(weights(whole), weights(plain)) > 1e-3
