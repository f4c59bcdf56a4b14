"""What the command line sets for a whole process before a study: no banners of libraries, no needless page faults."""

from __future__ import annotations

import ctypes
import logging
import sys
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


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the system after every step.

    Training on a CPU frees and takes the same activations again at each step; handing them back costs page faults (on
    the lab model about a seventh of the time). Does nothing with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # names of glibc's malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)
