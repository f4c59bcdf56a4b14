"""Measures and restores models once each: every result is a file named by what decides it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.diagnose.memorization import exact_memorization
from holdfast.diagnose.ranking import PerplexityScorer, perplexity
from holdfast.diagnose.restoring import RestoreSettings, restore
from holdfast.files import digest, write_json
from holdfast.models import load_model, save_model

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from holdfast.evaluate.tasks import EvalTask
    from holdfast.method import Method

CACHE = "cache"
FORMAT = 1  # raised when a cached result would no longer mean the same


@dataclass
class Subject:
    """A model by the hash of its weights; loaded when something about it isn't known yet."""

    name: str
    identity: str
    load: Callable[[], tuple[Any, Any]]
    held: tuple[Any, Any] | None = field(default=None, repr=False)

    def pair(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        if self.held is None:
            self.held = self.load()
        return self.held

    def release(self) -> None:
        self.held = None


def subject(source: str, identity: str, name: str) -> Subject:
    """A model that ``load_model`` can read."""

    return Subject(name, identity, lambda: load_to_measure(source))


def load_to_measure(source: str | Path) -> tuple[Any, Any]:
    """Model, on the GPU if there is one, and tokenizer."""
    from holdfast.probe import on_device

    model, tokenizer = load_model(source)
    return on_device(model), tokenizer


class Workbench:
    """The measurements of a diagnosis, in ``folder/cache``; interrupted, nothing finished is done again."""

    def __init__(self, folder: Path, say: Callable[[str], None], on_item: Callable[[int], None] | None = None) -> None:
        self.folder = folder / CACHE
        self.say = say
        self.on_item = on_item

    def items(self, who: Subject, tasks: Sequence[EvalTask]) -> pd.DataFrame:
        """One row per task and item, measured where it isn't cached."""
        import pandas as pd

        files = {task.name: self._file("items", ".parquet", who.identity, task.hash()) for task in tasks}
        missing = [task for task in tasks if not files[task.name].exists()]
        if missing:
            from holdfast.evaluate import measure

            count = sum(len(task.items) for task in missing)
            self.say(f"measuring {who.name}: {count:,} items")
            model, tokenizer = who.pair()
            frame = measure(model, tokenizer, missing, on_item=self.on_item)
            for task in missing:
                rows = frame[frame["task"] == task.name].reset_index(drop=True)
                temporary = files[task.name].with_suffix(".tmp")
                temporary.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(temporary)
                temporary.replace(files[task.name])
        return pd.concat([pd.read_parquet(file) for file in files.values()], ignore_index=True)

    def perplexity(self, who: Subject, texts: Sequence[str], max_tokens: int) -> float:
        """Per token, over the probing set."""

        def make() -> float:
            self.say(f"perplexity of {who.name}")
            model, tokenizer = who.pair()
            return perplexity(PerplexityScorer(model, tokenizer, max_tokens), texts)

        return float(self._value("perplexity", make, who.identity, list(texts), max_tokens))

    def memorization(self, who: Subject, tuning: Dataset | None) -> float | None:
        """Share of the tuning data's answer tokens that are the argmax; None without tuning data."""
        if tuning is None:
            return None

        def make() -> float:
            self.say(f"memorization of {who.name}")
            return exact_memorization(*who.pair(), tuning)

        return float(self._value("memorization", make, who.identity, tuning.to_dict()))

    def restored(
        self,
        who: Subject,
        texts: Sequence[str],
        probing: Sequence[str],
        settings: RestoreSettings,
        methods: Sequence[Method],
        max_tokens: int,
    ) -> tuple[Subject, list[tuple[float, float]]]:
        """The restored model as a subject of its own, and its probe perplexity on the way."""
        how = [asdict(settings), [{"method": type(m).__name__, **asdict(m)} for m in methods]]
        key = digest([FORMAT, who.identity, list(texts), list(probing), how, max_tokens])
        folder = self.folder / "restored" / key
        result = Subject(f"{who.name}, restored", f"restored:{key}", lambda: (None, None))

        def run() -> tuple[Any, Any]:
            if (folder / "model").is_dir():
                return load_to_measure(folder / "model")
            self.say(f"restoring {who.name}")
            model, tokenizer = who.pair()
            who.release()  # restoring changes the weights in place
            found = restore(
                model,
                tokenizer,
                texts,
                settings,
                methods=methods,
                probe=lambda m: perplexity(PerplexityScorer(m, tokenizer, max_tokens), probing),
            )
            save_model(found.model, tokenizer, folder / "model")
            write_json(folder / "trajectory.json", {"probe_perplexity": found.trajectory, "steps": found.steps})
            return found.model, tokenizer

        result.load = run
        if not (folder / "trajectory.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # weights without their trajectory: killed in between
            result.pair()
        trajectory = json.loads((folder / "trajectory.json").read_text(encoding="utf-8"))["probe_perplexity"]
        return result, [(float(share), float(value)) for share, value in trajectory]

    def drop_weights(self, who: Subject) -> None:
        """Free the disk space of a restored model; it is restored again if something new is asked about it."""
        shutil.rmtree(self.folder / "restored" / who.identity.removeprefix("restored:") / "model", ignore_errors=True)

    def _file(self, kind: str, suffix: str, *key: Any) -> Path:
        return self.folder / kind / (digest([FORMAT, kind, *key], length=32) + suffix)

    def _value(self, kind: str, make: Callable[[], Any], *key: Any) -> Any:
        file = self._file(kind, ".json", *key)
        if not file.exists():
            write_json(file, {"value": make()})
        return json.loads(file.read_text(encoding="utf-8"))["value"]
