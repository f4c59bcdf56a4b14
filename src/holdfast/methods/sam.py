"""Sharpness-aware minimisation: the gradient at the worst point nearby instead of the gradient here."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import UserError
from holdfast.method import Context, Grad, Method
from holdfast.methods.perturbation import (
    move,
    noise_like,
    realised,
    refuse_low_precision,
    scoped,
    sizes,
    top_mask,
)
from holdfast.tensors import Params, copies, dot, gradients, local, locals_, norm, restore


@dataclass
class SAM(Method):
    """Sharpness-aware minimisation and its family.

    g ← ∇L(θ + ε),  ε = ρ·∇L(θ)/‖∇L(θ)‖₂   (Foret et al. 2021, eq. 2; arXiv 2406.04836, eq. 2)

    The norm runs over the trainable parameters in scope and all ranks, in fp32, of the unclipped window gradient.
    Both gradients see the same window with the same dropout masks; θ comes back bit for bit, by copy.

    - ``adaptive``: ASAM, ε = ρ·T²g/‖Tg‖ with T = |θ|+``eta`` (``asam``, also ``true``) or |θ| (``magnitude``).
    - ``every``: perturb only every k-th step. With ``reuse`` = α > 0, the steps between add the sharp direction that
      the last perturbed step found: g + α·‖g‖/‖g_v‖·g_v, where g_v is the part of the sharp gradient orthogonal to g
      (LookSAM, Liu et al. 2022, Algorithm 1; α = 0.7 there).
    - ``scope``: ``all``, ``norm`` (normalisation layers: SAM-ON, Mueller et al. 2023), ``type:Linear``, or a regex.
    - ``mask``: share of the weights, those with the smallest Fisher, that is left unperturbed (Zhong et al. 2022);
      the Fisher is the square of a window gradient, renewed every ``mask_every`` steps.
    - ``group``: one perturbation per ``window``, or per ``micro`` batch (m-sharpness: a ρ found for one m is no ρ for
      another).
    - ``direction``: ``random`` is the control: noise of the same norm.
    - ``stochastic_rounding``: allows weights stored in bf16; the perturbation is then right on average.

    Cost: two gradients a step (1 + 1/k with ``every``) and one transient (sharded) copy of the weights in scope; with
    ``reuse`` one copy that stays and one during a perturbed step, with ``mask`` one byte a weight. UserError for
    weights stored in fp16 or bf16.
    """

    rho: float = 0.05
    adaptive: bool | Literal["asam", "magnitude"] = False
    eta: float = 0.01
    every: int = 1
    reuse: float = 0.0
    scope: str = "all"
    mask: float = 0.0
    mask_every: int = 100
    group: Literal["window", "micro"] = "window"
    direction: Literal["gradient", "random"] = "gradient"
    stochastic_rounding: bool = False

    name: ClassVar[str] = "sam"
    symbols: ClassVar[Mapping[str, str]] = {"rho": "ρ"}

    def __post_init__(self) -> None:
        self.require(self.rho >= 0, "rho", "at least 0")
        self.require(self.adaptive in (False, True, "asam", "magnitude"), "adaptive", "false, 'asam' or 'magnitude'")
        self.require(self.eta >= 0, "eta", "at least 0")
        self.require(self.every >= 1, "every", "at least 1")
        self.require(self.reuse >= 0, "reuse", "at least 0")
        self.require(not self.reuse or self.every > 1, "reuse", "0 unless every > 1 (it acts on the steps between)")
        self.require(0 <= self.mask < 1, "mask", "in [0, 1)")
        self.require(self.mask_every >= 1, "mask_every", "at least 1")
        self.require(self.group in ("window", "micro"), "group", "'window' or 'micro'")
        self.require(self.direction in ("gradient", "random"), "direction", "'gradient' or 'random'")
        try:
            re.compile(self.scope)
        except re.error as error:
            raise UserError(f"sam: scope '{self.scope}' is no regular expression: {error}.") from error
        self.steps = 0  # windows seen
        self.skipped = 0  # windows without an update because a pass was not finite
        self._usable = True  # every pass of this window so far was finite
        self._context = Context({})
        self._sharp: dict[str, Tensor] = {}  # LookSAM's g_v, local parts
        self._masks: dict[str, Tensor] = {}

    def begin(self, context: Context) -> None:
        self.steps = self.skipped = 0
        self._context, self._sharp, self._masks = context, {}, {}

    def gradient(self, grad: Grad, params: Params) -> Grad:
        if self.rho:
            refuse_low_precision(params, self.name, self.stochastic_rounding)
        if self.group == "micro" and not hasattr(grad, "parts"):
            raise UserError("sam: group='micro' must be the first method that edits the gradient.")
        inside = scoped(params, self.scope, self._context.model)
        return functools.partial(self._step, grad, params, inside)

    def state_dict(self) -> dict[str, Any]:
        sharp = {f"sharp/{name}": value for name, value in self._sharp.items()}
        masks = {f"mask/{name}": value for name, value in self._masks.items()}
        return {"steps": self.steps, "skipped": self.skipped, **sharp, **masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self._sharp = self._placed(state, "sharp/")
        self._masks = self._placed(state, "mask/")

    def _placed(self, state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        return {name: value.to(local(self._context.params[name]).device) for name, value in found.items()}

    # ---- one window ----

    def _step(self, grad: Grad, params: Params, inside: Params) -> Tensor | None:
        turn, self.steps = self.steps, self.steps + 1
        if turn % self.every:
            loss = grad()
            if self.reuse:
                self._add_sharp(inside)
            return loss
        self._usable = True
        run = self._per_micro_batch if self.group == "micro" else self._sharp_gradient
        loss = run(grad, params, inside, turn)
        self._context.log("skipped", float(not self._usable))
        if not self._usable:
            self._skip(params)
        return loss

    def _per_micro_batch(self, grad: Any, params: Params, inside: Params, turn: int) -> Tensor | None:
        """Sum of the micro-batches' gradients, each at its own worst point."""
        total: dict[str, Tensor] = {}
        losses = []
        for part in grad.parts():
            losses.append(self._sharp_gradient(part, params, inside, turn))
            for name, param in params.items():
                if param.grad is not None:
                    total[name] = total[name] + param.grad if name in total else param.grad
        for name, param in params.items():
            param.grad = total.get(name)
        known = [loss for loss in losses if loss is not None]
        return torch.stack(known).sum() if known else None

    def _sharp_gradient(self, grad: Grad, params: Params, inside: Params, turn: int) -> Tensor | None:
        before = grad()
        moved = {name: param for name, param in inside.items() if param.grad is not None}
        if not moved:
            return before
        plain = copies(gradients(moved.values())) if self.reuse else []
        length = self._direction(moved, turn)
        if not _finite(before) or not bool(torch.isfinite(length)):
            self._usable = False
            return before
        saved = copies(moved.values())
        try:
            self._perturb(moved, saved, float(length), turn)
            after = grad()
        finally:
            restore(moved.values(), saved)
        if not _finite(after):
            self._usable = False
            return before
        if before is not None and after is not None:
            self._context.log("sharpness", float(after - before))
        if self.reuse:
            self._remember_sharp(moved, plain)
        return before

    @torch.no_grad()
    def _direction(self, moved: dict[str, nn.Parameter], turn: int) -> Tensor:
        """Turn ``p.grad`` (scratch from here on) into the direction of ε; return what ρ is to be divided by."""
        weights = list(moved.values())
        direction = gradients(weights)
        length = norm(direction)
        self._context.log("grad_norm", float(length))
        if self.mask and (not self._masks or turn % self.mask_every == 0):
            self._masks = dict(zip(moved, top_mask([grad.square() for grad in direction], 1 - self.mask), strict=True))
        if self.direction == "random":
            noise = noise_like(weights, self._context.seed * 1_000_003 + turn)
            for part, drawn in zip(locals_(direction), noise, strict=True):
                part.copy_(drawn)
            length = norm(direction)
        if self.adaptive:
            scale = sizes(moved, "magnitude" if self.adaptive == "magnitude" else "asam", self.eta)
            torch._foreach_mul_(locals_(direction), scale)
            length = norm(direction)
            torch._foreach_mul_(locals_(direction), scale)
        for name, part in zip(moved, locals_(direction), strict=True):
            if name in self._masks:
                part.mul_(self._masks[name])
        return length

    @torch.no_grad()
    def _perturb(self, moved: dict[str, nn.Parameter], saved: Sequence[Tensor], length: float, turn: int) -> None:
        weights = list(moved.values())
        epsilon = locals_(gradients(weights))
        torch._foreach_mul_(epsilon, self.rho / length if length else 0.0)
        low = [part.dtype for part in epsilon if part.dtype == torch.bfloat16]
        move(locals_(weights), epsilon, self._context.seed * 1_000_003 + turn * 1009 if low else None)
        if self._context.logging_due():
            length, cosine = realised(weights, saved, epsilon)
            self._context.log("realised_rho", length)
            self._context.log("realised_cosine", cosine)
            self._context.log("relative_rho", self.rho / max(float(norm(saved, like=weights)), 1e-30))

    def _skip(self, params: Params) -> None:
        """A pass was not finite: no update from any part of the window, the step is counted."""
        if not self.skipped:
            warnings.warn(
                "sam: a loss or gradient was not finite; the step is skipped and counted (holdfast/sam/skipped). "
                "If it happens often, ρ or the learning rate is too large.",
                stacklevel=2,
            )
        self.skipped += 1
        for param in params.values():
            param.grad = None

    # ---- LookSAM ----

    @torch.no_grad()
    def _remember_sharp(self, moved: dict[str, nn.Parameter], plain: list[Tensor]) -> None:
        """g_v = g_s − (g_s·g/‖g‖²)·g, written over ``plain``"""
        weights = [param for param in moved.values() if param.grad is not None]
        sharp = locals_(gradients(weights))
        square = dot(plain, plain, like=weights)
        share = float(dot(sharp, plain, like=weights) / square) if square > 0 else 0.0
        torch._foreach_mul_(plain, -share)
        torch._foreach_add_(plain, sharp)
        self._sharp = dict(zip(moved, plain, strict=True))

    @torch.no_grad()
    def _add_sharp(self, inside: Params) -> None:
        """g ← g + α·‖g‖/‖g_v‖·g_v"""
        moved = {name: p for name, p in inside.items() if p.grad is not None and name in self._sharp}
        direction = [self._sharp[name] for name in moved]
        length = float(norm(direction, like=list(moved.values())))
        if length > 0:
            found = gradients(moved.values())
            factor = self.reuse * float(norm(found)) / length
            torch._foreach_add_(locals_(found), direction, alpha=factor)


def _finite(loss: Tensor | None) -> bool:
    return loss is None or bool(torch.isfinite(loss))


@dataclass
class MomentumSAM(Method):
    """SAM in the direction of the optimizer's momentum: no second gradient.

    g ← ∇L(θ + ε),  ε = −ρ·m/‖m‖₂, with m the momentum of SGD or the first moment of Adam
    (Becker et al. 2024, arXiv 2401.12033, Algorithm 1). The first step, before any momentum, is plain.
    Cost: one gradient a step, one transient (sharded) copy of the weights. Published ρ are larger than SAM's.
    """

    rho: float = 0.5

    name: ClassVar[str] = "msam"
    symbols: ClassVar[Mapping[str, str]] = {"rho": "ρ"}

    def __post_init__(self) -> None:
        self.require(self.rho >= 0, "rho", "at least 0")
        self._optimizer: torch.optim.Optimizer | None = None

    def begin(self, context: Context) -> None:
        self._optimizer = context.optimizer
        groups = context.optimizer.param_groups if context.optimizer is not None else []
        if self.rho and not all(group.get("momentum") or "betas" in group for group in groups):
            raise UserError("msam: the optimizer keeps no momentum. Use adamw_torch, or SGD with momentum.")

    def gradient(self, grad: Grad, params: Params) -> Grad:
        if self.rho:
            refuse_low_precision(params, self.name, False)
        return functools.partial(self._step, grad, params)

    def _step(self, grad: Grad, params: Params) -> Tensor | None:
        moved, momenta = self._momentum(params)
        length = float(norm(momenta, like=moved))
        if not length:
            return grad()
        saved = copies(moved)
        try:
            with torch.no_grad():
                torch._foreach_add_(locals_(moved), torch._foreach_mul(locals_(momenta), -self.rho / length))
            return grad()
        finally:
            restore(moved, saved)

    def _momentum(self, params: Params) -> tuple[list[nn.Parameter], list[Tensor]]:
        assert self._optimizer is not None, "begin() was not called"
        moved, momenta = [], []
        for param in params.values():
            state = self._optimizer.state.get(param, {})
            for key in ("exp_avg", "momentum_buffer"):
                if isinstance(state.get(key), Tensor):
                    moved.append(param)
                    momenta.append(state[key])
                    break
        return moved, momenta
