"""Evaluation inside training, every n steps, within a time budget; training itself is not changed by a bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from holdfast.errors import UserError
from holdfast.evaluate.forward import world
from holdfast.evaluate.measuring import measure
from holdfast.evaluate.summary import summarize
from holdfast.evaluate.tasks import EvalTask

FIRST_ITEMS = 16  # items per task of the first, timed block; each further block doubles


class EvaluateEvery(TrainerCallback):
    """Measures tasks before training, every ``steps`` optimizer steps and at the end.

    ``seconds``: time one evaluation may take. The first evaluation takes items of every task in growing blocks until
    that time is spent, and the same items are asked ever after, so that all points are paired. ``log`` gets the scores
    as {"panel/<task>": value}; ``trainer.log`` sends them to the Trainer's loggers. ``history`` holds one per-item
    table per evaluation. RNG, train mode and weights are untouched: training is the same bit for bit. Under DDP and
    FSDP2 every rank takes part and rank 0's clock decides.
    """

    def __init__(
        self,
        tasks: Sequence[EvalTask],
        tokenizer: Any,
        steps: int,
        *,
        seconds: float | None = None,
        batch_tokens: int | None = None,
        at_start: bool = True,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if steps < 1 or not tasks:
            raise UserError("EvaluateEvery needs at least one task and steps of at least 1.")
        if seconds is not None and seconds <= 0:
            raise UserError(f"seconds must be positive, got {seconds}.")
        self.tasks, self.tokenizer, self.steps = list(tasks), tokenizer, steps
        self.seconds, self.batch_tokens, self.at_start, self.log = seconds, batch_tokens, at_start, log
        self.history: list[tuple[int, pd.DataFrame]] = []
        self.spent = 0.0  # seconds of evaluation so far
        self._chosen: list[EvalTask] | None = None if seconds is not None else self.tasks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The scores before training."""
        if self.at_start and state.global_step == 0:
            self._evaluate(kwargs["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The scores after every ``steps`` steps."""
        if state.global_step % self.steps == 0:
            self._evaluate(kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The scores at the end, unless the last step had them."""
        if not self.history or self.history[-1][0] != state.global_step:
            self._evaluate(kwargs["model"], state)

    def summary(self) -> pd.DataFrame:
        """One row per evaluation and task: step, and the columns of `summarize`."""
        return pd.concat([summarize(items).assign(step=step) for step, items in self.history], ignore_index=True)

    def _evaluate(self, model: Any, state: TrainerState) -> None:
        start = time.perf_counter()
        items = self._within_budget(model, start) if self._chosen is None else self._measure(model, self._chosen)
        self.spent += time.perf_counter() - start
        self.history.append((state.global_step, items))
        if self.log is not None:
            self.log({f"panel/{row['task']}": float(row["value"]) for row in summarize(items).to_dict("records")})

    def _measure(self, model: Any, tasks: Sequence[EvalTask]) -> pd.DataFrame:
        return measure(model, self.tokenizer, tasks, batch_tokens=self.batch_tokens)

    def _within_budget(self, model: Any, start: float) -> pd.DataFrame:
        """Blocks of items of all tasks until the time is spent; a block that would overrun is not begun."""
        assert self.seconds is not None
        parts, done, block = [], 0, FIRST_ITEMS
        while done < max(len(task.items) for task in self.tasks):
            began = time.perf_counter()
            todo = [replace(t, items=t.items[done : done + block]) for t in self.tasks if len(t.items) > done]
            parts.append(self._measure(model, todo))
            now = time.perf_counter()
            done, next_block = done + block, done + block
            expected = (now - began) * next_block / block
            block = next_block
            if self._agreed(now - start + expected > self.seconds):
                break
        self._chosen = [task.limit(done) for task in self.tasks]
        found = pd.concat(parts, ignore_index=True)
        order = {task.name: k for k, task in enumerate(self.tasks)}
        return found.sort_values("task", key=lambda names: names.map(order), kind="stable", ignore_index=True)

    def _agreed(self, stop: bool) -> bool:
        """Rank 0's answer, on every rank."""
        if world()[1] == 1:
            return stop
        answer = [stop]
        torch.distributed.broadcast_object_list(answer, src=0)
        return bool(answer[0])
