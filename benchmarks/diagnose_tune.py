"""Instruction tuning with a saved model after chosen epochs: the runs that the diagnosis studies look at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from holdfast.models import load_model, save_model


def tune(
    model: str,
    rows: Dataset,
    out: Path,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    keep: Iterable[int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Train on prompt/completion rows (loss on the answers) and save ``out/epoch-k`` for the epochs in ``keep``.

    Epochs that are already there are not trained again if all of them are. Returns the folders in order.
    """
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    wanted = sorted(keep or range(1, epochs + 1))
    folders = [out / f"epoch-{epoch}" for epoch in wanted]
    if all(folder.is_dir() for folder in folders):
        return folders
    net, tokenizer = load_model(model)

    class Keep(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            epoch = round(state.epoch)
            print(f"epoch {epoch}, step {state.global_step}", flush=True)
            if epoch in wanted:
                save_model(model, tokenizer, out / f"epoch-{epoch}")

    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            **{"bf16": False, **(settings or {})},
        )
        trainer = SFTTrainer(model=net, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Keep()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return folders
