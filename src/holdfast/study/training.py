"""Runs one training step of a study through TRL's SFTTrainer with methods inside."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError
from holdfast.study.plan import Step
from holdfast.study.progress import Sink
from holdfast.study.streams import TaskData
from holdfast.unsupported import refuse_loss_type

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

# Where a study differs from TRL's own defaults: numbers must not depend on the machine (TRL turns bf16 on by itself),
# memory is traded for time only when asked, and a study has its own log and progress.
DEFAULTS: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 10,
    "save_strategy": "no",
    "disable_tqdm": True,
    "save_total_limit": 1,
}
SAVE_SECONDS = 900  # a training writes a checkpoint this often, so that an interruption costs no more than that


@dataclass(frozen=True)
class Trained:
    """A finished training: the model, and what was logged on the way."""

    model: PreTrainedModel
    history: list[dict[str, Any]]
    steps: int


def training_set(step: Step, data: dict[str, TaskData]) -> Dataset:
    """The rows a step trains on before its methods change them: one task's, or all tasks' for a joint training."""
    from datasets import concatenate_datasets

    parts = [data[name].train for name in step.tasks]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def training_arguments(step: Step, work: Path) -> SFTConfig:
    """A step's settings as TRL takes them. Raises UserError for values that it or a method refuses."""
    import torch
    from trl import SFTConfig

    accelerated = torch.accelerator.is_available()
    machine = {"dataloader_pin_memory": accelerated, "use_cpu": not accelerated}  # these change no number
    settings = {**DEFAULTS, **machine, **step.training}
    if settings.get("save_steps") and "save_strategy" not in step.training:
        settings["save_strategy"] = "steps"
    try:
        arguments = SFTConfig(output_dir=str(work), seed=step.seed, data_seed=step.seed, **settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"training: {error}") from None
    refuse_loss_type(arguments, step.methods)
    return arguments


def train(
    step: Step,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, TaskData],
    *,
    anchor: Path | str | None,
    base: Path | str | None,
    work: Path,
    sink: Sink,
) -> Trained:
    """Train ``model`` as ``step`` says; ``work`` holds the Trainer's own checkpoints."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from holdfast.trainer import with_methods

    trainer = with_methods(SFTTrainer)(
        model=model,
        args=training_arguments(step, work),
        train_dataset=training_set(step, data),
        processing_class=tokenizer,
        methods=list(step.methods),
        memory={name: data[name].train for name in step.memory},
        anchor=anchor,
        base=base,
        callbacks=[_progress_callback(sink), *_checkpoints(step)],
    )
    trainer.remove_callback(PrinterCallback)  # the log goes into the step's record
    trainer.train(resume_from_checkpoint=last_complete(work))
    return Trained(trainer.model, trainer.state.log_history, trainer.state.global_step)


def _progress_callback(sink: Sink) -> Any:
    from transformers import TrainerCallback

    class Advance(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sink.begin(f"training, {state.max_steps} steps", state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sink.advance()

    return Advance()


def _checkpoints(step: Step) -> list[Any]:
    """Checkpoints by the clock, unless the recipe says when to save."""
    from transformers import TrainerCallback

    if {"save_strategy", "save_steps"} & set(step.training):
        return []

    class SaveByTheClock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if time.monotonic() - self.last >= SAVE_SECONDS and state.global_step < state.max_steps:
                control.should_save = True
                self.last = time.monotonic()

    return [SaveByTheClock()]


def last_complete(work: Path) -> str | None:
    """The newest Trainer checkpoint that was written to its end; broken ones are removed."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    for folder in found:
        if _is_complete(folder):
            return str(folder)
        shutil.rmtree(folder)
    return None


def _is_complete(folder: Path) -> bool:
    """The Trainer writes its state last; every safetensors file must also be as long as its header says."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return all(_whole(path) for path in folder.rglob("*.safetensors"))


def _whole(path: Path) -> bool:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)
