"""Methods inside any Hugging Face ``Trainer``: the only host, and the only place that knows the Trainer."""

from __future__ import annotations

import functools
from typing import TypeVar

from holdfast.trainer.host import MethodsMixin

__all__ = ["MethodsMixin", "with_methods"]

T = TypeVar("T", bound=type)


@functools.cache
def with_methods(trainer_class: T) -> T:
    """A subclass of a Trainer class that also takes ``methods=[…]``.

    ``with_methods(SFTTrainer)(model=…, args=…, train_dataset=…, methods=[SAM(rho=0.05), SFA(p=0.25)])`` works as the
    class it came from: optimizer, scheduler, clipping, logging and checkpoints stay the Trainer's own. Further
    arguments: ``memory`` (past tasks' training sets by name, oldest first), ``anchor`` (a checkpoint folder to use as
    θ₀ instead of the weights when training starts), ``base`` (the checkpoint at the start of the stream of tasks).
    With no methods the numbers are those of the class it came from. UserError for what can't work, at the start.
    """
    if issubclass(trainer_class, MethodsMixin):
        return trainer_class
    name = f"{trainer_class.__name__}WithMethods"
    return type(name, (MethodsMixin, trainer_class), {"__doc__": trainer_class.__doc__})  # type: ignore[return-value]
