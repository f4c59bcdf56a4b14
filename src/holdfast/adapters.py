"""PEFT's ways of making a model trainable, by a recipe's mapping: LoRA, orthogonal subspaces (OSF), chosen targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# short recipe keys -> LoraConfig's own names
ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
KAPPA = "kappa"


def check_adapter(mapping: Mapping[str, Any], key: str = "lora") -> tuple[type[Any], dict[str, Any]]:
    """PEFT's configuration class and its fields for a recipe's mapping.

    ``type`` names a tuner of PEFT (default ``lora``); the other keys are the fields of its configuration (for LoRA
    also ``rank``, ``alpha``, ``dropout``), ``targets`` short for ``target_modules``. ``targets: {kappa: SHARE}`` takes
    the share of linear layers with the smallest condition numbers, which PEFT calls KappaTune.
    Raises UserError for an unknown type or key.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(mapping.get("type", "lora")).lower()
    if kind not in kinds:
        raise UserError(f"{key}: PEFT has no '{kind}'.{did_you_mean(kind, kinds)}")
    valid = {field.name for field in dataclasses.fields(kinds[kind]) if field.init} - {"peft_type", "task_type"}
    short = {alias: name for alias, name in ALIASES.items() if name in valid}
    settings: dict[str, Any] = {"target_modules": "all-linear"} if "target_modules" in valid else {}
    for name, value in mapping.items():
        if name == "type":
            continue
        if short.get(name, name) not in valid:
            raise UserError(f"{key}: unknown key '{name}'.{did_you_mean(name, valid | set(short))}")
        settings[short.get(name, name)] = value
    _kappa_share(settings, key)
    return kinds[kind], settings


def _kappa_share(settings: Mapping[str, Any], key: str) -> float | None:
    targets = settings.get("target_modules")
    if not isinstance(targets, Mapping):
        return None
    share = targets.get(KAPPA)
    if set(targets) != {KAPPA} or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(
            f"{key}: targets must be names or {{kappa: SHARE}} with a share in (0, 1], got {dict(targets)}."
        )
    return float(share)


def _kappa_targets(model: PreTrainedModel, share: float) -> dict[str, list[str]]:
    """The best conditioned ``share`` of the linear layers, and of fused experts; not the output layer (TRL's loss reads
    its weights past an adapter)."""
    from peft.helpers import KappaTuneSelector

    selector, output = KappaTuneSelector(model, show_progress=False), model.get_output_embeddings()
    ranked = [name for name in selector.get_best_targets() if model.get_submodule(name) is not output]
    found = {"target_modules": ranked[: max(1, int(share * len(ranked)))]}
    experts = selector.get_best_target_parameters(top_p=share)
    return found | ({"target_parameters": experts} if experts else {})


def with_adapter(model: PreTrainedModel, mapping: Mapping[str, Any], seed: int | None) -> PreTrainedModel:
    """Wrap a model as :func:`check_adapter` reads the mapping.

    Its random start comes from the global generator, or from ``seed``, which leaves that generator as it was.
    """
    import torch
    from peft import get_peft_model

    config, settings = check_adapter(mapping)
    share = _kappa_share(settings, "lora")
    if share is not None:
        settings |= _kappa_targets(model, share)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            wrapped: Any = get_peft_model(model, config(task_type="CAUSAL_LM", **settings))
        except (ValueError, TypeError) as error:
            text = str(error).strip().splitlines()
            raise UserError(f"lora: {text[0] if text else type(error).__name__}") from error
    return wrapped
