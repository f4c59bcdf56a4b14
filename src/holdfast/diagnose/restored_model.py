"""Restore one model into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.diagnose.compatible import check_checkpoints
from holdfast.diagnose.ranking import PerplexityScorer, perplexity
from holdfast.diagnose.request import Text, choose_text
from holdfast.diagnose.restoring import RestoreSettings, restore
from holdfast.diagnose.workbench import load_to_measure
from holdfast.errors import UserError
from holdfast.files import write_json
from holdfast.models import save_model, source_hash

if TYPE_CHECKING:
    from datasets import Dataset

    from holdfast.method import Method


def restore_model(
    model: str,
    base: str,
    corpus: str,
    out: str | Path,
    *,
    tuning: Dataset | None = None,
    tokens: int | None = None,
    restoring: RestoreSettings | None = None,
    methods: Sequence[Method] = (),
    column: str = "text",
    passage_words: int = 200,
    passages: int | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Rank ``corpus`` by the base's perplexity, restore ``model`` with the lowest, and save it in ``out``.

    The ranking is kept beside ``out`` (``out.text``), so an interrupted ranking continues and a second model restored
    to a folder of the same name pays nothing for it. Returns what is also in ``out/restore.json``: the text's account,
    the probe perplexity on the way and the base's. Raises UserError if ``out`` holds something else already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "restore.json").exists())):
        raise UserError(f"{out}: is in the way; it is not a restored model")
    warnings = check_checkpoints(base, [model])
    text = Text(
        base=base,
        corpus=corpus,
        tuning=tuning,
        tokens=tokens,
        column=column,
        passage_words=passage_words,
        passages=passages,
    )
    selection = choose_text(text, source_hash(base), out.with_name(f"{out.name}.text"), say)
    probing = [chosen.text for chosen in selection.probing]

    def probe(net: Any) -> float:
        return perplexity(PerplexityScorer(net, tokenizer), probing)

    net, tokenizer = load_to_measure(base)
    base_perplexity = probe(net)
    say(f"restoring {model}")
    net, tokenizer = load_to_measure(model)
    texts = [chosen.text for chosen in selection.restoring]
    found = restore(net, tokenizer, texts, restoring, methods=methods, probe=probe)
    save_model(found.model, tokenizer, out)
    account = {
        "model": model,
        "base": base,
        "base_perplexity": base_perplexity,
        "trajectory": found.trajectory,
        "steps": found.steps,
        "text": selection.account,
        "warnings": warnings,
    }
    write_json(out / "restore.json", account)
    return account
