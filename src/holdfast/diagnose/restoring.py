"""Train a tuned model on plain text until its format is the base's again (paper 2, section 3.1)."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from holdfast.method import Method

MICRO_TOKENS = 4096  # tokens of one forward; the batch is accumulated from such parts
Probe = Callable[[Any], float]  # a model's perplexity on the probing set


@dataclass(frozen=True)
class RestoreSettings:
    """How to restore. Defaults are the paper's (section 3.3) but for the batch, which was 256 there.

    ``batch_size`` counts blocks of ``max_length`` tokens. ``probes``: how many times perplexity is measured on the way.
    """

    learning_rate: float = 3e-5
    epochs: int = 1
    batch_size: int = 16
    max_length: int = 512
    seed: int = 0
    probes: int = 8
    training: dict[str, Any] = field(default_factory=dict)  # further TrainingArguments

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"the learning rate must be above 0, not {self.learning_rate}")
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Restored:
    """The restored model and the probe perplexity along its restoring: (share done, perplexity)."""

    model: PreTrainedModel
    trajectory: list[tuple[float, float]]
    steps: int


def restore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: RestoreSettings | None = None,
    *,
    methods: Sequence[Method] = (),
    probe: Probe | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Restored:
    """Train ``model`` in place on plain text, by default for one epoch at 3e-5.

    The texts are shuffled, joined with EOS and cut into blocks of ``max_length`` tokens; every token is supervised.
    It runs in the Trainer with any ``methods``; ``probe`` is called before, ``probes`` times on the way, and after.
    Cost: a training on the text. Raises UserError when there is no text to train on.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

    from holdfast.trainer import with_methods

    settings = settings or RestoreSettings()
    dataset = blocks(tokenizer, texts, _block_length(model, settings), settings.seed)
    parts = _parts(settings, dataset)
    trajectory = [(0.0, probe(model))] if probe else []
    with tempfile.TemporaryDirectory(prefix="holdfast-restore-") as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            **{
                "learning_rate": settings.learning_rate,
                "num_train_epochs": settings.epochs,
                "per_device_train_batch_size": settings.batch_size // parts,
                "gradient_accumulation_steps": parts,
                "seed": settings.seed,
                "data_seed": settings.seed,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "logging_strategy": "no",
                "dataloader_pin_memory": torch.cuda.is_available(),
                **settings.training,
            },
        )
        trainer = with_methods(Trainer)(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=default_data_collator,
            processing_class=tokenizer,
            methods=list(methods),
            callbacks=[_watch(settings, probe, trajectory, on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        with torch.enable_grad():
            trainer.train()
        steps = trainer.state.global_step
    model = trainer.model
    model.eval()
    if probe:
        trajectory.append((1.0, probe(model)))
    return Restored(model, trajectory, steps)


def blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, seed: int) -> Dataset:
    """Rows of ``length`` tokens from the shuffled texts, an EOS after each; the last, shorter one is masked padding."""
    from datasets import Dataset

    order = random.Random(seed).sample(range(len(texts)), len(texts))
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for row in tokenizer([texts[index] for index in order], add_special_tokens=False)["input_ids"] if order else []:
        stream += [*row, end] if end is not None else row
    if len(stream) < 2:
        raise UserError("restore: the text has no tokens to train on")
    ids = [stream[start : start + length] for start in range(0, len(stream), length)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or 0)
    missing = length - len(ids[-1])
    labels = [*ids[:-1], ids[-1] + [-100] * missing]
    attention = [[1] * len(row) for row in ids[:-1]] + [[1] * len(ids[-1]) + [0] * missing]
    ids[-1] = ids[-1] + [pad] * missing
    if len(ids) > 1 and length - missing < 2:  # a row with one token has nothing to predict
        ids, labels, attention = ids[:-1], labels[:-1], attention[:-1]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "attention_mask": attention})


def _block_length(model: PreTrainedModel, settings: RestoreSettings) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or settings.max_length
    return min(settings.max_length, int(longest))


def _parts(settings: RestoreSettings, dataset: Dataset) -> int:
    """The smallest number of equal parts of a batch that keeps one forward within the token limit."""
    length = len(dataset[0]["input_ids"])
    most = max(1, MICRO_TOKENS // length)
    return next(
        parts
        for parts in range(1, settings.batch_size + 1)
        if settings.batch_size % parts == 0 and settings.batch_size // parts <= most
    )


def _watch(
    settings: RestoreSettings,
    probe: Probe | None,
    trajectory: list[tuple[float, float]],
    on_step: Callable[[int, int], None] | None,
) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if on_step:
                on_step(state.global_step, state.max_steps)
            every = max(1, math.ceil(state.max_steps / (settings.probes + 1)))
            if probe and state.global_step % every == 0 and state.global_step < state.max_steps:
                trajectory.append((state.global_step / state.max_steps, probe(model)))

    return Watch()
