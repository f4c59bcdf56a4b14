"""The embedded world: a small pretrained language model with its corpus, its benchmark and three taught tasks.

>>> from holdfast import lab
>>> lab.model_dir()                  # a normal Hugging Face folder
>>> lab.load_task("math", "train")   # prompt and completion
>>> lab.panel(), lab.eval_task("math")
"""

from __future__ import annotations

from pathlib import Path

from holdfast.lab.benchmark import eval_task, panel
from holdfast.lab.corpus import corpus
from holdfast.lab.known_truth import contradictions, instructions
from holdfast.lab.tasks import load_task

__all__ = ["contradictions", "corpus", "eval_task", "instructions", "load_task", "model_dir", "panel"]


def model_dir() -> Path:
    """The packaged pretrained model's folder: Llama architecture, float32 safetensors, tokenizer, ``recipe.json``."""
    return Path(__file__).parent / "model"
