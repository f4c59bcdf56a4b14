"""From a verdict to what to do about it, with the evidence beside it and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.diagnose.decomposition import Decomposition


def advice(found: Decomposition) -> list[str]:
    """Sentences for one decomposition: what was found, what to do, and what the numbers can't say."""
    drop, shift, loss = (part.in_points() for part in (found.drop, found.pattern_shift, found.knowledge_loss))
    if found.verdict == "none":
        said = [f"No forgetting shown: the drop is {drop} points. Nothing needs doing for these benchmarks."]
    elif found.verdict == "pseudo":
        said = [
            f"The format shifted, the knowledge is there: the score fell by {drop} points and restoring brought back "
            f"{shift}; {loss} points are missing after it.",
            "Restore briefly with plain text (holdfast restore), mix plain text into the tuning data, or ask in the "
            "format that the model was tuned on.",
        ]
    elif found.verdict == "actual":
        said = [
            f"Knowledge was lost: of a drop of {drop} points, {loss} are missing after restoring"
            + (f", where the base lost {found.control.in_points()} by the same restoring." if found.control else "."),
            "Restoring will not bring it back. Tune again with SFA or rehearsal, or stop at an earlier checkpoint.",
        ]
    elif found.verdict == "withheld":
        said = [
            f"No verdict: {found.reason}.",
            "Restore with more text, a higher learning rate, or text closer to what the base was pretrained on.",
        ]
    else:
        said = [f"Not decided: {found.reason}. Drop {drop}, knowledge loss {loss} points."]
        if found.items_needed is not None:
            said.append(
                f"About {found.items_needed:,} items instead of {found.items:,} would decide it, if the measured "
                "differences are the true ones."
            )
    return said + _cautions(found)


def _cautions(found: Decomposition) -> list[str]:
    said = []
    if found.control is None:
        said.append("There is no control: what restoring itself does to the base was not measured.")
    elif found.control.high < 0:
        said.append(
            f"Restoring improved the base itself by {-100 * found.control.value:.1f} points, so a return to the base's "
            "score may hide some loss."
        )
    elif found.control.low > 0 and found.verdict in ("pseudo", "actual"):
        said.append(f"Restoring alone costs the base {found.control.in_points()} points; part of the loss may be that.")
    return said


def advise_run(verdicts: Sequence[tuple[str, Decomposition]]) -> list[str]:
    """Which checkpoint to take, for checkpoints (name, pooled decomposition) in the order of training."""
    judged = [(name, found) for name, found in verdicts if found.verdict in ("none", "pseudo", "actual")]
    lost = [name for name, found in judged if found.verdict == "actual"]
    kept = [name for name, found in judged if found.verdict != "actual"]
    if not lost:
        return []
    if not kept:
        return [f"Every checkpoint that could be judged lost knowledge, from '{lost[0]}' on."]
    return [
        f"'{kept[-1]}' is the last checkpoint judged not to have lost knowledge; '{lost[0]}' is the first that has."
    ]


def contamination_notice(account: Mapping[str, object]) -> str | None:
    """One sentence about benchmark text in the corpus, if there is any."""
    passages = account.get("passages", 0)
    if not passages:
        return None
    what = "were left out" if account.get("excluded") else "were KEPT, so restoring can teach the benchmark"
    return f"{passages} passages of the corpus hold text of {account.get('items')} benchmark items; they {what}."
