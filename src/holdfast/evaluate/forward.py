"""The only code here that calls a model: block-masked forwards behind a cached trunk, logits only where needed.

Everything that differs between ranks is hidden here: with sharded weights (FSDP) every forward is a collective, so each
rank announces each forward and ranks without work join in with a one-token forward until all are done.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]
_OPEN: set[int] = set()  # ids of the models that are in `evaluation_mode` now


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is an allocation that failed, on an accelerator or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, whose own forward needs no other rank."""
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward is a collective operation (FSDP1 or FSDP2)."""
    try:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor
    except ImportError:  # a build of torch without distributed
        return False
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def world() -> tuple[int, int]:
    """(rank, number of ranks) of the default process group, (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Run without gradients, in eval mode; afterwards every module's mode, RNG and grad mode are as before.

    Not `torch.inference_mode`: weights gathered inside it could take no part in autograd later. FSDP2 modules are
    resharded at the end, so that edits of the weights are not lost; at the end of the outermost block only: a rank that
    resharded alone would gather alone at its next forward, which no other rank would join.
    """
    outermost = id(model) not in _OPEN
    _OPEN.add(id(model))
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        model.eval()
        if isinstance(attention, str) and "flash" in attention and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("sdpa")  # flash kernels take no block mask
        with torch.no_grad():
            yield
    finally:
        if isinstance(attention, str) and "flash" in attention and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attention)
        for module in training:
            module.training = True
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        if outermost:
            _OPEN.discard(id(model))
            for module in model.modules():
                reshard = getattr(module, "reshard", None)
                if callable(reshard):
                    reshard()


class Forward:
    """Calls a causal LM of transformers on token trees.

    ``packed`` says whether the model takes block masks and caches as expected; `self_check` finds out by asking.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = unwrap(model)
        self.config: Any = getattr(self.model, "config", None)
        if self.config is not None and hasattr(self.config, "get_text_config"):
            self.config = self.config.get_text_config(decoder=True)
        self.rank, self.ranks = world()
        self.lockstep = self.ranks > 1 and is_sharded(self.model)
        self.packed = True

    @property
    def device(self) -> torch.device:
        embeddings = getattr(self.model, "get_input_embeddings", lambda: None)()
        parameter = next((embeddings or self.model).parameters())
        return parameter.device

    @property
    def sliding_window(self) -> int | None:
        """Tokens a windowed layer sees, or None if every layer sees all."""
        if getattr(self.config, "use_sliding_window", True) is False:
            return None
        return getattr(self.config, "sliding_window", None)

    def _announce(self, working: bool) -> bool:
        """One integer to all ranks: whether any of them still has forwards to run."""
        flag = torch.tensor([int(working)], device=self.device if self.device.type == "cuda" else "cpu")
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def finish(self) -> None:
        """Keep the other ranks company until all of them are done (sharded models only)."""
        while self.lockstep and self._announce(False):
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def __call__(self, *, need: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits (float32, [len(need), V]) at the flat positions ``need`` of [B·L], and the output's cache.

        Without output embeddings to hook, all logits are made and then selected.
        """
        if self.lockstep:
            self._announce(True)
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        picked = False

        def pick(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal picked
            picked = True
            hidden = arguments[0]
            return (hidden.reshape(-1, hidden.shape[-1])[need].unsqueeze(0), *arguments[1:])

        handle = head.register_forward_pre_hook(pick) if head is not None and need is not None else None
        try:
            output = self.model(**inputs)
        finally:
            if handle is not None:
                handle.remove()
        logits = output.logits
        logits = logits.reshape(-1, logits.shape[-1])
        if need is not None and not picked:
            logits = logits[need]
        return logits.float(), getattr(output, "past_key_values", None)

    def attention(self, visible: Tensor, query: Tensor, key: Tensor) -> Any:
        """The model's mask argument from who-sees-whom [B, Q, K] and the positions of queries [B, Q] and keys [B, K].

        Models that mix full and sliding-window layers take a dict of masks, one per kind.
        """
        eager = getattr(self.config, "_attn_implementation", "sdpa") == "eager"

        def finished(mask: Tensor) -> Tensor:
            mask = mask[:, None]
            if not eager:
                return mask
            dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

        window = self.sliding_window
        if window is None:
            return finished(visible)
        near = visible & (query[:, :, None] - key[:, None, :] < window)
        kinds = set(getattr(self.config, "layer_types", None) or ["sliding_attention"])
        if kinds == {"sliding_attention"}:
            return finished(near)
        masks = {"full_attention": finished(visible), "sliding_attention": finished(near)}
        return masks if kinds == set(masks) else masks["full_attention"]

    def prefill(self, trunk: tuple[int, ...]) -> Cache:
        """The keys and values of a trunk, one [1, heads, P, width] pair per layer. Cost: one forward of P tokens."""
        from transformers import DynamicCache

        tokens = torch.tensor([trunk], device=self.device)
        last = torch.tensor([len(trunk) - 1], device=self.device)
        positions = torch.arange(len(trunk), device=self.device)[None]
        visible = torch.ones(1, len(trunk), len(trunk), dtype=torch.bool, device=self.device).tril()
        mask = self.attention(visible, positions, positions) if self.sliding_window is not None else None
        _, cache = self(
            need=last,
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        return [(layer.keys, layer.values) for layer in cache.layers]


def expanded(trunk: Cache, rows: int) -> Any:
    """A cache that holds the trunk in front of each of ``rows`` rows; the first update copies, so the trunk stays."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = []
    for keys, values in trunk:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys = keys.expand(rows, -1, -1, -1)
        layer.values = values.expand(rows, -1, -1, -1)
        layers.append(layer)
    cache = DynamicCache()
    cache.layers = layers
    return cache
