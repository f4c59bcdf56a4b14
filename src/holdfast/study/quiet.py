"""Keep the libraries' own bars and banners out of a study's output."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Only errors from transformers, TRL, accelerate and datasets; no progress bars of theirs. For the command line."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|accelerate|peft)\.")
