"""The host: the window, its gradient, the edits of weights and the state of methods, inside a Trainer."""

from __future__ import annotations

import contextlib
import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from holdfast import run_state, tensors
from holdfast.anchor import Anchor, Folder, Snapshot, aliases
from holdfast.errors import UserError
from holdfast.method import (
    Context,
    Keep,
    Memory,
    Method,
    apply_checkpoint,
    apply_data,
    compose_gradient,
    with_seam,
)
from holdfast.probe import ModelProbe
from holdfast.run_state import START
from holdfast.trainer.loss import LossSeam
from holdfast.unsupported import refuse_unsupported
from holdfast.window import Window, WindowGradient, counters, restore_counters


class MethodsMixin(LossSeam):
    """What :func:`holdfast.trainer.with_methods` puts in front of a Trainer class."""

    def __init__(
        self,
        *args: Any,
        methods: Sequence[Method] = (),
        memory: Mapping[str, Any] | None = None,
        anchor: str | Path | None = None,
        base: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        self.methods = checked(methods)
        self._anchor_paths = {"task": anchor, "base": base or anchor}
        self._past_data = dict(memory or {})
        self._anchors: dict[str, Anchor] = {}
        self._measured: dict[str, list[float]] = {}
        self._resumed_from: str | None = None
        self._start_saved = False  # θ₀ is beside the checkpoints
        self._gradient: Callable[[], Tensor | None] | None = None
        self._params: tensors.Params = {}
        args, kwargs = self._with_mixed_data(super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)
        callback = _AtSeams(self._begin_methods, self._edit_weights, self._end_methods)
        self.callback_handler.callbacks.insert(0, callback)

    def _with_mixed_data(
        self, init: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The data seam, before the Trainer (TRL) tokenizes its training set."""
        if not with_seam(self.methods, "data"):
            return args, kwargs
        bound = inspect.signature(init).bind(*args, **kwargs)
        where = bound.arguments if "train_dataset" in bound.arguments else bound.arguments.get("kwargs", kwargs)
        train_dataset = where.get("train_dataset")
        if train_dataset is None:
            raise UserError("Methods that edit the data need train_dataset when the trainer is made.")
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        settings: Any = given.get("args")
        seed = 0
        if settings is not None:
            seed = settings.seed if settings.data_seed is None else settings.data_seed
        memory = Memory(
            self._past_data,
            seed=seed,
            model=self._anchor_paths["base"] or given.get("model"),
            tokenizer=given.get("processing_class"),
            cache=Path(settings.output_dir) / "holdfast" if settings is not None else None,
        )
        where["train_dataset"] = apply_data(self.methods, train_dataset, memory)
        return bound.args, bound.kwargs

    # ---- start and end of training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        refuse_unsupported(self, self.methods)
        self._resumed_from = None
        if resume_from_checkpoint:
            folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
            self._resumed_from = folder if resume_from_checkpoint is True else str(resume_from_checkpoint)
        output = Path(str(self.args.output_dir)).resolve()
        self._start_saved = self._resumed_from is not None and Path(self._resumed_from).resolve().parent == output
        self._anchors.clear()
        self._measured.clear()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._keep_result()
        return result

    def _begin_methods(self) -> None:
        """Bind the methods to the weights and the optimizer, which are in place (and sharded) now."""
        if not self.methods:
            return
        assert self.model is not None
        self._params = tensors.trainable(self.model)
        if not self._params:
            raise UserError("The model has no trainable parameters.")
        resumed = None if self._resumed_from is None else Path(self._resumed_from)
        if resumed is not None:
            self._anchors |= run_state.load_start(resumed.parent, self._rank_file(), self._params)
        if with_seam(self.methods, "checkpoint"):
            self._anchor("task", "disk")  # taken now: after training it would be too late
        for method in self.methods:
            method.begin(self._context(method))
        if resumed is not None:
            run_state.load(resumed, self._rank_file(), self.methods, self._params)
        self._gradient = None
        if with_seam(self.methods, "gradient"):
            self._window_gradient = WindowGradient(
                self._params,
                self.args.device,
                self._forward_backward,
                lambda loss: self.accelerator.reduce(loss, "mean"),
                self._unrecorded,
            )
            self._gradient = compose_gradient(self.methods, self._window_gradient, self._params)

    def _context(self, method: Method) -> Context:
        prefix = f"holdfast/{method.name}"
        return Context(
            params=self._params,
            model=self.model,
            total=self.state.max_steps,
            seed=self.args.seed + zlib.crc32(method.name.encode()) % 100_000,  # whatever its place in the list
            optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
            find_anchor=self._anchor,
            log=lambda name, value: self._measured.setdefault(f"{prefix}/{name}", []).append(float(value)),
            logging_due=self._logging_due,
            probe=self._probe(),
            resuming=self._resumed_from is not None,
        )

    def _probe(self) -> ModelProbe:
        assert self.model is not None
        return ModelProbe(
            self.model,
            self._past_data,
            self.train_dataset,
            lambda rows: self.data_collator(rows),
            self._prepared,
            self._shifts(),
            self.args.device,
        )

    def _prepared(self, data: Any) -> Any:
        """A training set as the collator takes it: tokenized by TRL, unused columns removed."""
        if hasattr(self, "_prepare_dataset") and "input_ids" not in getattr(data, "column_names", ["input_ids"]):
            data = self._prepare_dataset(data, self.processing_class, self.args, False, None, "past")
        return self._remove_unused_columns(data, "past") if hasattr(data, "column_names") else data

    def _anchor(self, which: str, keep: Keep) -> Anchor:
        """θ₀ by name, made once for all methods that want it in the same place."""
        path = self._anchor_paths.get(which, which)
        if path is None:
            return self._start_of_training()
        key = f"{path} on {keep}"
        if key not in self._anchors:
            assert self.model is not None
            folder = Folder(Path(path), aliases(self.model))
            if hasattr(self.model, "peft_config") and not folder.holds(self._params):
                return self._start_of_training()  # a fresh adapter: the folder is the model under it
            found: Anchor = folder
            if keep != "disk":
                read = {name: folder.local(name, param) for name, param in self._params.items()}
                found = Snapshot.of({name: part.to("cpu") for name, part in read.items()} if keep == "cpu" else read)
            self._anchors[key] = found
        return self._anchors[key]

    def _start_of_training(self) -> Anchor:
        if START not in self._anchors:
            if self._resumed_from is not None:
                raise UserError(
                    f"The weights that training started from are not beside {self._resumed_from}. "
                    "Pass anchor=<folder of the starting checkpoint>."
                )
            self._anchors[START] = Snapshot(self._params)
        return self._anchors[START]

    def _end_methods(self) -> None:
        """Training that was stopped early still gets the last edit of the weights (SFA's and EMA's final average)."""
        done, total = self.state.global_step, self.state.max_steps
        if 0 < done < total and not self.args.load_best_model_at_end:
            self._edit_weights(total=done)

    def _keep_result(self) -> None:
        """The checkpoint seam, in place, once training is over."""
        methods = with_seam(self.methods, "checkpoint")
        if not methods:
            return
        anchor = self._anchor("task", "disk")
        tensors.make_editable(self.model)
        with torch.no_grad():
            tuned = {name: tensors.local(param) for name, param in self._params.items()}
            start = {name: anchor.local(name, param) for name, param in self._params.items()}
            kept = apply_checkpoint(methods, tuned, start)
            for name, part in tuned.items():
                part.copy_(kept[name])

    # ---- the window and its gradient ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._gradient is not None:
            self._window_gradient.window = Window(batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The window's gradient at its last micro-batch; the micro-batches before it only wait.

        Waiting lets a method move the weights before the first pass, and puts all passes under one set of rules for
        when ranks exchange gradients.
        """
        if self._gradient is None:
            return super().training_step(model, inputs, num_items_in_batch)
        window = self._window_gradient.window
        window.seen += 1
        if not window.complete:
            return torch.zeros((), device=self.args.device)
        self._stepped = (model, num_items_in_batch)
        self._gradient()
        for loss in window.losses[:-1]:
            if math.isfinite(loss):
                self._tr_loss += loss
        return window.losses[-1]

    def _forward_backward(self, inputs: Any, exchange: bool) -> Tensor:
        model, num_items = self._stepped
        with self._synced(model, exchange):
            return super().training_step(model, inputs, num_items)

    @contextlib.contextmanager
    def _synced(self, model: nn.Module, exchange: bool) -> Iterator[None]:
        """Ranks exchange gradients once per pass, at its last micro-batch, as the Trainer does it."""
        state = self.accelerator.gradient_state
        state._set_sync_gradients(exchange)
        if exchange or state.plugin_kwargs.get("sync_each_batch", False):
            waiting: Any = contextlib.nullcontext()
        elif self._sharded_at_load():
            waiting = self._defer_fsdp_gradient_reduction()
        else:
            waiting = self.accelerator.no_sync(model)
        with waiting:
            yield
        state._set_sync_gradients(True)

    def _sharded_at_load(self) -> bool:
        return getattr(self, "is_distributed_loading_by_transformers", False) and getattr(
            self.model, "_is_fsdp_managed_module", False
        )

    @contextlib.contextmanager
    def _unrecorded(self) -> Iterator[None]:
        saved = counters(self)
        try:
            yield
        finally:
            restore_counters(self, saved)

    # ---- weights, logs, checkpoints ----

    def _edit_weights(self, total: int | None = None) -> None:
        methods = with_seam(self.methods, "weights")
        if not methods:
            return
        tensors.make_editable(self.model)
        for method in methods:
            method.weights(self._params, self.state.global_step, total or self.state.max_steps)

    def _logging_due(self) -> bool:
        """Whether the step under way will be logged: costly measurements are made only then."""
        step = self.state.global_step + 1
        every = max(1, int(self.state.logging_steps or 1))
        return step % every == 0 or (step == 1 and bool(self.args.logging_first_step))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, values in self._measured.items():
                logs[name] = sum(values) / len(values)
            self._measured.clear()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.methods and not self.args.save_only_model:
            run = Path(self._get_output_dir(trial=trial))
            start = self._anchors.get(START)
            if isinstance(start, Snapshot) and not self._start_saved and self._writes():
                run_state.save_start(run, self._rank_file(), start)
            self._start_saved = True
            folder = run / f"checkpoint-{self.state.global_step}"
            run_state.save(folder, self._rank_file(), self.methods, self._writes())
        super()._save_checkpoint(model, trial)

    def _rank_file(self) -> str:
        """Shards differ between ranks, and each rank keeps its own; replicas are written once."""
        sharded = any(tensors.as_dtensor(param) is not None for param in self._params.values())
        return f"rank{self.args.process_index}" if sharded else "rank0"

    def _writes(self) -> bool:
        return self.args.should_save or self._rank_file() != "rank0"


class _AtSeams(TrainerCallback):
    """Calls the host at the moments that only callbacks get."""

    def __init__(self, begin: Callable[[], None], step: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._step, self._end = begin, step, end

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._end()


def checked(methods: Sequence[Method]) -> list[Method]:
    """The methods as a list; UserError if one is a class or a name, or if one object is there twice."""
    found = list(methods)
    for method in found:
        if not isinstance(method, Method):
            raise UserError(f"methods must hold Method objects such as SAM(rho=0.05), got {method!r}.")
    if len({id(method) for method in found}) < len(found):
        raise UserError("The same method object is in the list twice; make two objects.")
    return found
