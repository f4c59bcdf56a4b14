"""The one abstraction: a method edits one (or more) of five parts of a task's training.

====================  ===========================  ==========================================
seam                  what it edits                for example
====================  ===========================  ==========================================
``data``              what the task trains on      rehearsal
``loss``              what is minimised            distillation to the anchor
``gradient``          what the optimizer is given  SAM, L2, EWC
``weights``           the weights, after a step    SFA, EMA
``checkpoint``        the result of a task         WiSE-FT, Fisher merging
====================  ===========================  ==========================================

Every seam maps a part of training to the same kind of part. The order of a list of methods is its meaning: the first
is innermost.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.anchor import Anchor, Snapshot
from holdfast.errors import UserError, did_you_mean
from holdfast.tensors import Params

SEAMS = ("data", "loss", "gradient", "weights", "checkpoint")

Grad = Callable[[], "Tensor | None"]
"""Leaves in ``p.grad`` the gradient of the mean loss over the whole window and returns that loss; may be repeated."""


Keep = Literal["device", "cpu", "disk"]
"""Where θ₀ lives between uses."""


class Probe(typing.Protocol):
    """Single examples and their likelihood under the current weights, in evaluation mode; made by the host."""

    def tasks(self) -> list[str]:
        """Names of the past tasks whose data is there, oldest first."""
        ...

    def examples(self, task: str | None, count: int, seed: int) -> list[Any]:
        """Up to ``count`` examples of a past task (None: of the task being trained), drawn without replacement."""
        ...

    def log_likelihood(self, examples: Sequence[Any], labels: str, generator: torch.Generator) -> Tensor:
        """Sum over examples and supervised tokens of log p(label), in nats, with its graph.

        ``labels``: those of the ``data``, or sampled from the ``model``.
        """
        ...


@dataclass
class Batch:
    """A micro-batch as the loss seam sees it."""

    inputs: dict[str, Any]
    weight: Any  # of one supervised token: a sum over tokens times this is the micro-batch's part of the window's mean
    forward: Callable[[], Tensor]  # logits of the current weights in evaluation mode, without graph
    want_logits: bool = False  # set before the inner loss runs to get `logits`
    logits: Tensor | None = None  # at supervised positions, (tokens, vocabulary), with their graph


LossFn = Callable[[Batch], Tensor]


@dataclass
class Memory(Mapping[str, Any]):
    """What is kept of the past for the data seam: past tasks' training sets by name, oldest first.

    ``seed`` decides every draw. ``model``, ``tokenizer`` and ``cache`` are there for methods that generate data.
    """

    tasks: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    model: Any = None  # the model that is about to be trained (or a checkpoint folder of the base model)
    tokenizer: Any = None
    cache: Any = None  # folder for generated data, or None

    def __getitem__(self, name: str) -> Any:
        return self.tasks[name]

    def __iter__(self) -> typing.Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass
class Context:
    """What a method may know about the run it is in; made by the host, given to :meth:`Method.begin`."""

    params: Params  # trainable parameters, each storage once
    model: nn.Module | None = None  # unwrapped
    total: int = 0  # optimizer steps of the task
    seed: int = 0
    optimizer: torch.optim.Optimizer | None = None
    find_anchor: Callable[[str, Keep], Anchor] | None = None
    log: Callable[[str, float], None] = lambda name, value: None
    logging_due: Callable[[], bool] = lambda: True
    probe: Probe | None = None  # likelihoods of single examples
    resuming: bool = False  # load_state_dict will follow: costly state need not be made
    _snapshot: Anchor | None = None

    def anchor(self, which: str = "task", keep: Keep = "device") -> Anchor:
        """θ₀: ``task`` (start of the task), ``base`` (start of the stream) or a checkpoint folder.

        ``keep``: a copy on the ``device``, a copy in ``cpu`` memory, or read from ``disk`` at each use; without a
        folder to read from, ``disk`` is a copy on the device.
        """
        if self.find_anchor is not None:
            return self.find_anchor(which, keep)
        if self._snapshot is None:
            self._snapshot = Snapshot(self.params)
        return self._snapshot


@dataclass
class Method:
    """Base class. A subclass is a dataclass whose fields are its recipe keys; it overrides the seams it edits."""

    name: ClassVar[str] = ""
    symbols: ClassVar[Mapping[str, str]] = {}  # field -> the symbol that formulas print
    needs_past: ClassVar[bool] = False  # whether it uses past tasks' data (memory)

    def data(self, task: Any, memory: Mapping[str, Any]) -> Any:
        """The training set to use instead of ``task``, given past tasks' training sets."""
        return task

    def loss(self, loss_fn: LossFn) -> LossFn:
        """The function of a micro-batch to minimise instead of ``loss_fn``."""
        return loss_fn

    def gradient(self, grad: Grad, params: Params) -> Grad:
        """The gradient to use instead of ``grad``."""
        return grad

    def weights(self, params: Params, step: int, total: int) -> None:
        """Edit the weights in place after optimizer step ``step`` (1-based) of ``total``."""

    def checkpoint(self, tuned: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights to keep as the task's result, given the trained ones and θ₀; lazily, tensor by tensor."""
        return tuned

    def begin(self, context: Context) -> None:
        """Called when a task's training starts, with weights and optimizer in place: make run-time state here."""

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run needs to go on exactly: tensors and JSON values, flat."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; called after :meth:`begin`."""

    def settings(self) -> dict[str, Any]:
        """The recipe mapping that makes an equal method."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def label(self) -> str:
        """Name with the settings that matter: those with a symbol, and those that differ from their default."""
        shown = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in self.symbols:
                shown.append(f"{self.symbols[item.name]}={value}")
            elif value != item.default and not (
                item.default_factory is not dataclasses.MISSING and value == item.default_factory()
            ):
                shown.append(f"{item.name}={value}")
        return f"{self.name}({', '.join(shown)})"

    def require(self, condition: bool, setting: str, expected: str) -> None:
        """UserError naming the method, the setting, what was expected and what was given."""
        if not condition:
            raise UserError(f"{self.name}: {setting} must be {expected}, got {getattr(self, setting)!r}.")


def seams(method: Method) -> set[str]:
    """Which of the five seams a method edits. One whose only seam is ``checkpoint`` never needs training."""
    return {seam for seam in SEAMS if getattr(type(method), seam) is not getattr(Method, seam)}


def with_seam(methods: Sequence[Method], seam: str) -> list[Method]:
    """The methods that edit a seam, in order."""
    return [method for method in methods if seam in seams(method)]


def apply_data(methods: Sequence[Method], task: Any, memory: Mapping[str, Any]) -> Any:
    """The data seam of a list of methods."""
    for method in with_seam(methods, "data"):
        task = method.data(task, memory)
    return task


def compose_loss(methods: Sequence[Method], loss_fn: LossFn) -> LossFn:
    """The loss seam of a list of methods."""
    for method in with_seam(methods, "loss"):
        loss_fn = method.loss(loss_fn)
    return loss_fn


def compose_gradient(methods: Sequence[Method], grad: Grad, params: Params) -> Grad:
    """The gradient seam of a list of methods: the first is innermost."""
    for method in with_seam(methods, "gradient"):
        grad = method.gradient(grad, params)
    return grad


def apply_checkpoint(
    methods: Sequence[Method], tuned: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The checkpoint seam of a list of methods, on state dicts that may be lazy."""
    for method in with_seam(methods, "checkpoint"):
        tuned = method.checkpoint(tuned, anchor)
    return tuned


def describe(methods: Sequence[Method], clip: float | None = None) -> list[str]:
    """One line per seam that is edited, outermost first, e.g. ``gradient: clip(1.0) ∘ ewc(λ=10) ∘ sam(ρ=0.05)``."""
    lines = []
    for seam in SEAMS:
        labels = [method.label() for method in reversed(with_seam(methods, seam))]
        if labels and seam == "gradient" and clip:
            labels.insert(0, f"clip({clip})")
        if labels:
            lines.append(f"{seam}: {' ∘ '.join(labels)}")
    return lines


def from_spec(name: str, mapping: Mapping[str, Any] | None = None) -> Method:
    """The method a recipe names, with its settings; one UserError for an unknown name, key or value."""
    from holdfast.methods import METHODS

    if name not in METHODS:
        raise UserError(f"Unknown method '{name}'.{did_you_mean(name, METHODS)}")
    kind = METHODS[name]
    if mapping is not None and not isinstance(mapping, Mapping):
        raise UserError(f"{name}: settings must be a mapping such as {{rho: 0.05}}, got {mapping!r}.")
    known = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in (mapping or {}).items():
        if key not in known:
            raise UserError(f"{name}: unknown setting '{key}'.{did_you_mean(str(key), known)}")
        values[key] = _typed(name, key, value, hints[key])
    missing = [
        key
        for key, item in known.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and key not in values
    ]
    if missing:
        raise UserError(f"{name}: the setting '{missing[0]}' is required.")
    return kind(**values)


def _typed(name: str, key: str, value: Any, hint: Any) -> Any:
    """``value`` as the field's type: numbers in text (YAML reads 1e-4 as text) are numbers; else UserError."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal and any(
            type(value) is type(v) and value == v for v in typing.get_args(option)
        ):
            return value
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option in (int, float) and not isinstance(value, bool):
            number = _number(value, option)
            if number is not None:
                return number
        if option is str and isinstance(value, str):
            return value
        origin = typing.get_origin(option) or option
        if origin not in (int, float, bool, str, Literal) and isinstance(origin, type) and isinstance(value, origin):
            return value
    raise UserError(f"{name}: {key} must be {_spoken(options)}, got {value!r}.")


def _number(value: Any, kind: type) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if kind is int:
        return int(number) if number.is_integer() and not isinstance(value, str) else None
    return number


def _spoken(options: Sequence[Any]) -> str:
    words: list[str] = []
    for option in options:
        if typing.get_origin(option) is Literal:
            words += [repr(value) for value in typing.get_args(option)]
        else:
            plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            words.append(plain.get(option, "empty" if option is type(None) else "a mapping or list"))
    return " or ".join(words)
