"""The checkpoint seam on disk: a finished checkpoint and its anchor in, a new checkpoint out, no training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import UserError
from holdfast.method import Method, apply_checkpoint
from holdfast.recipe import Recipe
from holdfast.study.store import Store

if TYPE_CHECKING:
    from torch import Tensor


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, single-file or sharded."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: no safetensors files; it has {', '.join(p.name for p in sorted(folder.iterdir()))}."
        )
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def edit_checkpoint(methods: tuple[Method, ...], tuned: Path, anchor: Path, out: Path) -> None:
    """Write ``out``: ``tuned`` with its weights mapped through the methods' checkpoint seams, in their order."""
    from safetensors.torch import save_file

    before, after = read_weights(anchor), read_weights(tuned)
    missing = sorted(set(after) - set(before))
    if missing:
        raise UserError(f"{anchor} lacks {len(missing)} tensors of {tuned}, for example {missing[0]}.")
    weights = apply_checkpoint(methods, after, before)
    out.mkdir(parents=True)
    for file in tuned.iterdir():
        if not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy2(file, out / file.name)
    contiguous = {name: tensor.to(after[name].dtype).contiguous() for name, tensor in weights.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})


def base_folder(recipe: Recipe, store: Store) -> Path:
    """The base model as a local folder of safetensors, written once where ``model`` is something else."""
    from holdfast.sources import locate

    found = locate(recipe.model)
    if found.kind == "folder":
        return Path(found.at)
    folder = store.root / "base"
    if not folder.exists():
        from holdfast.models import load_model, save_model

        model, tokenizer = load_model(recipe.model, dtype=recipe.dtype)
        save_model(model, tokenizer, folder)
    return folder
