"""Combinations that can't be right, refused before training starts, each with the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.errors import UserError
from holdfast.method import Method, with_seam

IN_BACKWARD = ("lomo", "adalomo")  # optimizers that step inside backward


def is_sft(trainer: Any) -> bool:
    """Whether this is TRL's SFTTrainer, without importing TRL."""
    return any(kind.__name__ == "SFTTrainer" and kind.__module__.startswith("trl") for kind in type(trainer).__mro__)


def refuse_loss_type(args: Any, methods: Sequence[Method]) -> None:
    """UserError if a method needs logits that the SFTConfig's loss never makes."""
    loss = ", ".join(method.name for method in with_seam(methods, "loss"))
    kind = getattr(args, "loss_type", "nll")
    if loss and kind != "nll":
        raise UserError(f"{loss}: TRL's loss_type='{kind}' never makes logits. Use loss_type='nll'.")


def refuse_unsupported(trainer: Any, methods: Sequence[Method]) -> None:
    """UserError if a method can't work with this trainer's engine, precision or optimizer."""
    gradient = ", ".join(method.name for method in with_seam(methods, "gradient"))
    weights = ", ".join(method.name for method in with_seam(methods, "weights"))
    loss = ", ".join(method.name for method in with_seam(methods, "loss"))
    acting = ", ".join(name for name in (gradient, weights, loss) if name)
    if not acting:
        return
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise UserError(
            f"{acting}: DeepSpeed keeps gradients and weights where a method can't reach them. "
            "Use FSDP2 (from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))) or DDP."
        )
    if getattr(trainer, "is_fsdp_enabled", False):
        plugin = trainer.accelerator.state.fsdp_plugin
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise UserError(f"{acting}: FSDP1 flattens parameters. Use FSDP2: fsdp_config={{'version': 2}}.")
    if gradient and getattr(trainer.accelerator, "scaler", None) is not None:
        raise UserError(
            f"{gradient}: fp16 training scales gradients by a changing factor, so a method would see wrong ones. "
            "Use bf16=True (or fp32) instead of fp16=True."
        )
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if gradient and (optimizer in IN_BACKWARD or optimizer.endswith("_layerwise")):
        raise UserError(f"{gradient}: optim='{optimizer}' steps during backward. Use adamw_torch, for example.")
    if is_sft(trainer):
        refuse_loss_type(trainer.args, methods)
