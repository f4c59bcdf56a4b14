"""Everything in the output folder besides the weights: copied files, merge.json and the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Files written here become visible with their folder, so they need no atomic write of their own; forcing each to disk
# would also wait for the weights, for seconds.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp", ".ckpt")
NOT_COPIED = {
    "README.md", "merge.json", "sweep.json", "adapter_config.json", "trainer_state.json", ".gitattributes",
}  # fmt: skip
LARGEST = 200_000_000  # bytes; a bigger file is no config or tokenizer
CARD_FILES = 12  # input files listed on the card


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, not synchronised to disk."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def companions(folders: Sequence[Path]) -> dict[str, Path]:
    """Config, tokenizer, chat template, generation config, …: from the first folder that has each."""
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            skipped = path.suffix in WEIGHTS or path.name.endswith(".index.json") or path.name.startswith(".")
            if path.is_file() and not skipped and path.name not in NOT_COPIED and path.stat().st_size <= LARGEST:
                found.setdefault(path.name, path)
    return found


def copy_companions(folder: Path, files: Mapping[str, Path], dtype: str | None) -> None:
    """Copy the files; config.json is told the new dtype if the weights changed theirs."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    config = folder / "config.json"
    if dtype and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        content.pop("torch_dtype", None)
        write_json(config, {**content, "dtype": dtype})


def model_card(record: Mapping[str, Any], title: str) -> str:
    """README.md with the front matter that model hubs read, the formula, the settings and the inputs."""
    models = [*([record["base"]] if record.get("base") else []), *record["models"]]
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- holdfast", "base_model:"]
    lines += [f"- {json.dumps(Path(model).name)}" for model in models] + ["---", "", f"# {title}", ""]
    lines += [f"Merged with holdfast {record['holdfast']}, method `{record['method']}`: {record['formula']}", ""]
    lines += ["| model | role | weight |", "|---|---|---|"]
    if record.get("base"):
        lines.append(f"| {Path(record['base']).name} | base | |")
    weights = record["weights"] or [""] * len(record["models"])
    lines += [
        f"| {Path(model).name} | model {i} | {weight} |"
        for i, (model, weight) in enumerate(zip(record["models"], weights), 1)
    ]
    if record["settings"]:
        lines += ["", "Settings: " + ", ".join(f"`{key} = {value}`" for key, value in record["settings"].items())]
    hashes = list(record["inputs"].items())
    lines += ["", "Inputs (SHA-256; all of them in `merge.json`):", ""]
    lines += [f"- `{Path(path).name}` {digest}" for path, digest in hashes[:CARD_FILES]]
    return "\n".join(lines) + "\n"


def finish_folder(folder: Path, record: Mapping[str, Any], title: str, index: Mapping[str, Any] | None) -> None:
    """Write index, merge.json and card into a folder whose weights are complete."""
    if index is not None:
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "merge.json", record)
    (folder / "README.md").write_text(model_card(record, title), encoding="utf-8")
