"""What methods need to go on after an interruption, beside the Trainer's checkpoints: safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.anchor import Anchor, Snapshot
from holdfast.errors import UserError
from holdfast.files import write_json
from holdfast.method import Method
from holdfast.tensors import Params, local

START = "start of training"  # how the host keys the weights that training started from
FOLDER = "holdfast"  # in the output directory (anchors) and in each checkpoint (state of methods)


def save(checkpoint: Path, rank: str, methods: Sequence[Method], writes: bool) -> None:
    """Write the methods' state into a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    plain = []
    for index, method in enumerate(methods):
        state = method.state_dict()
        tensors |= {f"{index}/{key}": value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
        values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        plain.append({"name": method.name, "settings": method.settings(), "state": values})
    if writes:
        write_json(checkpoint / FOLDER / f"methods-{rank}.json", plain)
        if tensors:
            save_file(tensors, str(checkpoint / FOLDER / f"methods-{rank}.safetensors"))


def load(checkpoint: Path, rank: str, methods: Sequence[Method], params: Params) -> None:
    """Give the methods their state back; UserError if the checkpoint was made with other methods or settings."""
    path = checkpoint / FOLDER / f"methods-{rank}.json"
    if not path.is_file():
        raise UserError(
            f"{checkpoint} was saved without methods, so they can't continue from it. Start anew without it."
        )
    saved = json.loads(path.read_text())
    then = [(entry["name"], entry["settings"]) for entry in saved]
    now = json.loads(json.dumps([(method.name, method.settings()) for method in methods], default=str))
    if then != [tuple(entry) for entry in now]:
        raise UserError(f"{checkpoint} was made with other methods: {then}, now {[tuple(entry) for entry in now]}.")
    stored = path.with_suffix(".safetensors")
    tensors = load_file(str(stored)) if stored.is_file() else {}
    for index, (method, entry) in enumerate(zip(methods, saved, strict=True)):
        prefix = f"{index}/"
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        method.load_state_dict({**entry["state"], **own})


def save_start(output: Path, rank: str, start: Snapshot) -> None:
    """Write the starting weights once per run, so that an interrupted run finds its θ₀ again."""
    path = output / FOLDER / f"start-{rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: part.contiguous() for name, part in start.tensors().items()}, str(path))


def load_start(output: Path, rank: str, params: Params) -> dict[str, Anchor]:
    """The starting weights that :func:`save_start` wrote, if it did, as the host keys them."""
    path = output / FOLDER / f"start-{rank}.safetensors"
    if not path.is_file():
        return {}
    parts = load_file(str(path))
    return {START: Snapshot.of({name: parts[name].to(local(param).device) for name, param in params.items()})}
