"""Methods where training is not plain: TRL, LoRA, checkpointing, tied, frozen and unused parameters; refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_world import SGD_RUN, Rows, distance, losses, same_bits, text_task, tiny_llama, train, train_text, weights
from transformers import Trainer

from holdfast import EWC, L2, SAM, SFA, Distill, Rehearsal, WiSEFT, with_methods
from holdfast.errors import UserError
from holdfast.unsupported import refuse_unsupported

SPLITS = [{"gradient_accumulation_steps": n, "per_device_train_batch_size": 4 // n} for n in (1, 4)]


def test_trl_counts_each_window_once(tmp_path: Path) -> None:
    """A replay computes the loss again, but TRL's tokens, entropy and accuracy are those of plain training."""
    plain, sam = train_text(tmp_path), train_text(tmp_path, [SAM(rho=0.5)])
    first, second = plain.state.log_history[0], sam.state.log_history[0]
    assert first["loss"] == second["loss"] and first["entropy"] == second["entropy"]
    for one, other in zip(plain.state.log_history, sam.state.log_history):
        assert one.get("num_tokens") == other.get("num_tokens")
    assert {"holdfast/sam/sharpness", "holdfast/sam/realised_rho", "holdfast/sam/grad_norm"} <= set(second)


def test_trl_with_methods_at_all_seams_is_the_same_for_every_split(tmp_path: Path) -> None:
    methods = lambda: [Rehearsal(share=0.25), Distill(), SAM(rho=0.5), EWC(samples=3), SFA(p=0.5), WiSEFT(alpha=0.8)]  # noqa: E731
    runs = [train_text(tmp_path, methods(), learning_rate=1e-3, **split) for split in SPLITS]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=2e-5)
    assert runs[0].train_dataset.num_rows == 14 and "x" not in text_task()["prompt"]


def test_a_users_own_counters_see_the_first_pass_only(tmp_path: Path) -> None:
    class Counting(Trainer):
        calls = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.calls, self.seen = 0, []

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            self.seen.append(float(loss))
            return loss

    plain = train(tmp_path, trainer_class=Counting)
    sam = train(tmp_path, [SAM(rho=0.5)], trainer_class=Counting)
    assert plain.calls == sam.calls == len(sam.seen) == 4
    assert plain.seen[0] == sam.seen[0]


@pytest.mark.parametrize("method", [lambda: SAM(rho=0.5), lambda: L2(weight=1.0), lambda: SFA(p=0.5)])
def test_gradient_checkpointing_changes_nothing(method: Any, tmp_path: Path) -> None:
    run = {**SGD_RUN, "model": tiny_llama(dropout=0.1)}
    plain = train(tmp_path, [method()], **run)
    run["model"] = tiny_llama(dropout=0.1)
    saved = train(tmp_path, [method()], gradient_checkpointing=True, **run)
    assert distance(weights(plain), weights(saved)) <= 1e-6


def test_tied_weights_are_edited_once(tmp_path: Path) -> None:
    """θ ← (1−β)θ + βθ₀ once, not twice, for the shared embedding."""
    start = {name: param.detach().clone() for name, param in tiny_llama(tied=True).named_parameters()}
    plain = train(tmp_path, model=tiny_llama(tied=True))
    averaged = train(tmp_path, [SFA(p=1.0, beta=0.25)], model=tiny_llama(tied=True))
    expected = {name: 0.75 * value + 0.25 * start[name] for name, value in weights(plain).items()}
    assert distance(weights(averaged), expected) <= 1e-7
    model = averaged.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tiny_llama(tied=True).save_pretrained(tmp_path / "start")
    streamed = train(
        tmp_path, [SFA(p=1.0, beta=0.25)], model=tiny_llama(tied=True), extra={"anchor": tmp_path / "start"}
    )
    assert same_bits(weights(averaged), weights(streamed))


def test_frozen_and_unused_parameters(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.ones(3))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    methods = [L2(weight=0.5), SAM(rho=0.5), SFA(p=0.5), WiSEFT(alpha=0.9)]
    after = weights(train(tmp_path, methods, model=model))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    torch.testing.assert_close(after["unused"], torch.ones(3))
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def lora() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("anchored", [False, True])
def test_lora_trains_its_adapter_under_every_seam(anchored: bool, tmp_path: Path) -> None:
    """An anchor folder that is the model under a fresh adapter means: the adapter as it starts."""
    tiny_llama().save_pretrained(tmp_path / "base")
    extra: dict[str, Any] = {"memory": {"past": Rows(6, seed=5)}}
    if anchored:
        extra["anchor"] = tmp_path / "base"
    methods = [Distill(), SAM(rho=0.1), L2(weight=0.1), EWC(samples=2), SFA(p=0.5), WiSEFT(alpha=0.7)]
    model = lora()
    base = {name: param.detach().clone() for name, param in model.named_parameters() if "lora" not in name}
    trainer = train(tmp_path, methods, model=model, extra=extra)
    after = weights(trainer)
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert any(float(value.abs().max()) > 0 for name, value in after.items() if "lora_B" in name)
    plain = train(tmp_path, [SFA(p=1.0, beta=0.5)], model=lora())
    full = train(tmp_path, model=lora())
    for name, value in weights(plain).items():
        if "lora_B" in name:  # B starts at 0: what is averaged is the adapter's own matrices
            torch.testing.assert_close(value, 0.5 * weights(full)[name])


def test_data_needs_a_training_set_when_the_trainer_is_made(tmp_path: Path) -> None:
    from tiny_world import arguments

    with pytest.raises(UserError, match="train_dataset"):
        with_methods(Trainer)(model=tiny_llama(), args=arguments(tmp_path), methods=[Rehearsal()])
    positional = with_methods(Trainer)(
        tiny_llama(), arguments(tmp_path), None, Rows(8), methods=[Rehearsal(share=0.5)], memory={"a": Rows(8, seed=9)}
    )
    assert len(positional.train_dataset) == 8 and positional.train_dataset is not None


def test_what_can_not_be_right_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    with pytest.raises(UserError, match="stochastic_rounding"):
        train(tmp_path, [SAM(rho=0.05)], model=model)
    with pytest.raises(UserError, match="memory="):
        train(tmp_path, [EWC()])
    with pytest.raises(UserError, match="Method objects"):
        train(tmp_path, [SAM])
    same = SAM()
    with pytest.raises(UserError, match="twice"):
        train(tmp_path, [same, same])
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        train(tmp_path, [L2()], extra={"anchor": tmp_path})


def fake(**changes: Any) -> Any:
    args = SimpleNamespace(optim="adamw_torch")
    accelerator = SimpleNamespace(scaler=None)
    return SimpleNamespace(**({"args": args, "accelerator": accelerator} | changes))


@pytest.mark.parametrize(
    ("trainer", "methods", "way_out"),
    [
        (fake(is_deepspeed_enabled=True), [SAM()], "FSDP2"),
        (fake(is_deepspeed_enabled=True), [SFA()], "FSDP2"),
        (fake(accelerator=SimpleNamespace(scaler=object())), [L2()], "bf16=True"),
        (fake(args=SimpleNamespace(optim="adalomo")), [SAM()], "adamw_torch"),
        (
            fake(
                is_fsdp_enabled=True,
                accelerator=SimpleNamespace(
                    scaler=None, state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
                ),
            ),
            [SFA()],
            "version",
        ),
    ],
)
def test_engines_that_are_refused(trainer: Any, methods: Any, way_out: str) -> None:
    with pytest.raises(UserError, match=way_out):
        refuse_unsupported(trainer, methods)
    refuse_unsupported(trainer, [Rehearsal(), WiSEFT()])  # these two ask nothing of the engine


def test_where_the_anchor_lives_changes_nothing(tmp_path: Path) -> None:
    """A copy beside the weights, one in main memory, or the folder read at every step: the same bits."""
    start = tiny_llama()
    start.save_pretrained(tmp_path / "start")
    runs = [train(tmp_path, [L2(weight=0.5)])]
    for keep in ("device", "cpu", "disk"):
        runs.append(train(tmp_path, [L2(weight=0.5, keep=keep)], extra={"anchor": tmp_path / "start"}))
    assert all(same_bits(weights(runs[0]), weights(other)) for other in runs[1:])


def test_base_is_the_start_of_the_stream_and_a_folder_is_itself(tmp_path: Path) -> None:
    other = tiny_llama()
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(0.5)
    other.save_pretrained(tmp_path / "base")
    far = {name: param.detach() for name, param in other.named_parameters()}
    expected = {name: 0.5 * value + 0.5 * far[name] for name, value in weights(train(tmp_path)).items()}
    extra = {"base": tmp_path / "base"}
    assert distance(weights(train(tmp_path, [SFA(p=1.0, anchor="base")], extra=extra)), expected) <= 1e-7
    named = SFA(p=1.0, anchor=str(tmp_path / "base"))
    assert distance(weights(train(tmp_path, [named])), expected) <= 1e-7
