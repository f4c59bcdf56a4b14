"""Marks on the timeline, advice, and lm-eval sample files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.diagnose.advice import advice, advise_run, contamination_notice
from holdfast.diagnose.decomposition import decompose
from holdfast.diagnose.diagnosis import at_chance, labelled
from holdfast.diagnose.samples import decompose_samples, read_samples
from holdfast.diagnose.timeline import marks
from holdfast.errors import UserError
from holdfast.evaluate.tasks import EvalTask, Item

NAN = float("nan")


def test_marks_look_at_benchmarks_answered_by_label():
    def task(name: str, *choices: tuple[str, ...]) -> EvalTask:
        items = tuple(Item(f"{name}/{n}", "?", one, 0) for n, one in enumerate(choices))
        return EvalTask(name, "choice", items)

    letters = task("letters", (" A", " B"), (" A", " B"))
    words = task("words", (" gold", " iron"), (" Mali", " Peru"))
    written = EvalTask("written", "generate", (Item("written/0", "?", (), "gold"),), metric="exact_match")
    assert labelled([words, letters, written]) == ["letters"]
    assert labelled([words, written]) == ["words", "written"]


@pytest.mark.parametrize(
    ("right", "items", "chance", "warned"),
    [(30, 100, 25.0, True), (40, 100, 25.0, False), (20, 100, 25.0, True), (1, 100, 0.0, False), (0, 0, 25.0, False)],
)
def test_a_base_that_guesses_is_warned_of(right, items, chance, warned):
    task = EvalTask("letters", "choice", (Item("0", "?", (" A", " B", " C", " D"), 0),), chance=chance)
    notice = at_chance(task, [1.0] * right + [0.0] * (items - right) + [NAN])
    assert bool(notice) == warned
    if notice:
        assert notice.startswith(f"letters: the base scores {right:.1f} % [") and "chance (25 %)" in notice


@pytest.mark.parametrize(
    ("mass", "expected"),
    [([0.1, 0.96, 0.99], 1), ([0.96, 0.9, 0.97], 2), ([0.96, 0.9], None), ([0.95], None), ([NAN, 0.99], 1), ([], None)],
)
def test_format_alignment_is_where_mass_stays_above(mass, expected):
    assert marks(mass, [], []).format_aligned == expected


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [([1, 2, 1.5, 1.8, 1.2, 0.9], 3), ([3, 2, 1], 0), ([1, 2, 1], None), ([1, 1, 1], None), ([2, 1, NAN], None)],
)
def test_entropy_declines_from_its_last_rise(entropy, expected):
    assert marks([], entropy, []).entropy_declines == expected


@pytest.mark.parametrize(
    ("verdicts", "expected", "throughout"),
    [
        (["none", "pseudo", "undecided", "actual", "actual"], 3, False),
        (["pseudo", "actual", "pseudo", "actual"], 3, False),
        (["pseudo", "actual", "pseudo"], None, False),
        (["actual", "withheld", "actual"], None, True),
        (["undecided", "withheld"], None, False),
    ],
)
def test_transition_from_pseudo_to_actual(verdicts, expected, throughout):
    found = marks([], [], verdicts)
    assert found.actual_from == expected
    assert found.actual_throughout is throughout


def scores(right: int, items: int = 400) -> np.ndarray:
    return (np.arange(items) < right).astype(float)


def test_advice_follows_the_verdict_and_quotes_the_evidence():
    pseudo = decompose(scores(360), scores(200), scores(358), scores(359))
    actual = decompose(scores(360), scores(200), scores(220), scores(359))
    few = decompose(scores(9, 10), scores(7, 10), scores(9, 10))
    assert pseudo.verdict == "pseudo" and "40.0 [" in advice(pseudo)[0] and "holdfast restore" in advice(pseudo)[1]
    assert actual.verdict == "actual" and "35.0 [" in advice(actual)[0] and "rehearsal" in advice(actual)[1]
    assert few.verdict == "undecided" and f"{few.items_needed:,} items instead of 10" in advice(few)[1]
    assert "no control" in advice(few)[-1]
    held = pseudo.withheld("its perplexity did not come back")
    assert held.verdict == "withheld" and "did not come back" in advice(held)[0]
    assert decompose(scores(9), scores(9), scores(9)).withheld("x").verdict == "none"
    said = advise_run([("e1", pseudo), ("e2", few), ("e3", actual)])
    assert "'e1' is the last" in said[0] and "'e3' is the first" in said[0]
    assert advise_run([("e1", pseudo)]) == []


def test_advice_mentions_what_restoring_did_to_the_base():
    better = decompose(scores(300), scores(200), scores(300), scores(360))
    assert any("improved the base itself by 15.0" in line for line in advice(better))
    assert contamination_notice({"passages": 0}) is None
    assert "left out" in str(contamination_notice({"passages": 3, "items": 2, "excluded": True}))


def write(folder: Path, task: str, values: np.ndarray, time: str = "2025-01-02T03-04-05.678", **more: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"doc_id": i, "filter": "none", "metrics": ["acc"], "doc_hash": f"h{i}", "acc": float(v), **more}
        for i, v in enumerate(values)
    ]
    (folder / f"samples_{task}_{time}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_sample_files_give_what_the_arrays_give(tmp_path):
    values = {"base": scores(360), "tuned": scores(200), "restored": scores(355), "control": scores(359)}
    for role, array in values.items():
        write(tmp_path / role / "model__name", "arc_easy", array)
        write(tmp_path / role / "model__name", "mmlu_anatomy", array[::-1][:50])
    write(tmp_path / "base" / "model__name", "arc_easy", scores(0), time="2024-01-02T03-04-05.678")  # an older run
    found = decompose_samples(*(tmp_path / role for role in values))
    assert set(found) == {"arc_easy", "mmlu_anatomy", "pooled"}
    assert found["arc_easy"] == decompose(*values.values())


def test_the_filter_and_the_metric_can_be_named(tmp_path):
    rows = [
        {"doc_id": 0, "filter": "strict", "exact_match": 0.0, "acc_norm": 1.0},
        {"doc_id": 0, "filter": "flexible", "exact_match": 1.0},
    ]
    file = tmp_path / "samples_gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_samples(file)["gsm8k"].scores == {0: 0.0}
    assert read_samples(file, filter_name="flexible")["gsm8k"].scores == {0: 1.0}
    assert read_samples(file, metric="acc_norm")["gsm8k"].scores == {0: 1.0}
    with pytest.raises(UserError, match=r"gsm8k.jsonl:1: no number under 'acc_nor'. Did you mean 'acc_norm'"):
        read_samples(file, metric="acc_nor")
    with pytest.raises(UserError, match="no filter 'lenient'"):
        read_samples(file, filter_name="lenient")


def test_samples_that_do_not_match_are_refused(tmp_path):
    write(tmp_path / "a", "arc", scores(5, 10))
    write(tmp_path / "b", "arc", scores(5, 9))
    write(tmp_path / "c", "arc", scores(5, 10), doc_hash="other")
    write(tmp_path / "d", "boolq", scores(5, 10))
    with pytest.raises(UserError, match="different items"):
        decompose_samples(tmp_path / "a", tmp_path / "b", tmp_path / "a")
    with pytest.raises(UserError, match="another question for restored"):
        decompose_samples(tmp_path / "a", tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="no task in common"):
        decompose_samples(tmp_path / "a", tmp_path / "a", tmp_path / "d")
    with pytest.raises(UserError, match="no such file"):
        read_samples(tmp_path / "nothing")
    (tmp_path / "a" / "samples_x.jsonl").write_text('{"doc_id": 1}\n{broken')
    with pytest.raises(UserError, match=r"samples_x.jsonl:1: no per-item metric"):
        read_samples(tmp_path / "a")
