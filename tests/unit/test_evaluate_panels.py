"""Panels, formats, probes and result folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import lab
from holdfast.errors import UserError
from holdfast.evaluate import EvalTask, Item
from holdfast.evaluate.formats import FORMATS
from holdfast.evaluate.panel_data import from_hub, read_rows, sample_items
from holdfast.evaluate.panels import PANELS, build, load_panel
from holdfast.evaluate.probes import calibration_error, perplexities, probe_table
from holdfast.evaluate.store import cached_measure, load_results, model_hash, read_lm_eval_samples, save_results
from holdfast.metrics import PAPER1_GROUPS

ROWS: dict[str, dict[str, Any]] = {
    "question": {"question": "q", "choices": ["a", "b"], "answer": 1},
    "stem": {"question": "The sun is", "fact1": "a fact", "choices": ["a", "b"], "answer": 1},
    "hellaswag": {"context": "c", "choices": ["a", "b"], "answer": 1},
    "mmlu": {"subject": "s", "question": "q", "choices": ["a", "b"], "answer": 1},
    "copa": {"premise": "It fell.", "question": "cause", "choices": ["I let go.", "It flew."], "answer": 1},
    "boolq": {"passage": "p", "question": "is it", "answer": True},
    "entailment": {"premise": "p", "hypothesis": "h", "label": 1},
    "siqa": {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"},
    "race": {"article": "a", "question": "q", "options": ["a", "b"], "answer": "B"},
    "csl": {"abst": "摘", "keyword": ["一", "二"], "label": "1"},
    "casehold": {"citing_prompt": "p", "label": 1, **{f"holding_{k}": str(k) for k in range(5)}},
    "overruling": {"sentence": "s", "label": 1},
    "tos": {"text": "t", "label": 1},
}


def test_every_format_makes_an_item_with_its_answer() -> None:
    for name, row in ROWS.items():
        item = FORMATS[name]("0", row)
        assert item.answer == 1, name
        assert len(item.choices) > 1, name
        EvalTask(name, "choice", (item,))
    assert FORMATS["gsm8k"]("0", {"question": "q", "answer": "so\n#### 1,234"}).answer == "1,234"
    assert set(FORMATS) == {*ROWS, "gsm8k", "humaneval", "text"}


def test_prompts_as_written_down() -> None:
    assert FORMATS["copa"]("0", ROWS["copa"]).prompt == "It fell because"
    assert FORMATS["copa"]("0", ROWS["copa"]).choices == (" i let go.", " it flew.")
    assert FORMATS["mmlu"]("0", ROWS["mmlu"]).prompt == "q\nA. a\nB. b\nAnswer:"
    assert FORMATS["mmlu"]("0", ROWS["mmlu"]).choices == (" A", " B")
    assert FORMATS["question"]("0", ROWS["question"]).prompt == "Question: q\nAnswer:"


def test_hub_rows_become_the_same_columns() -> None:
    arc = {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert FORMATS["question"]("0", from_hub(arc)).answer == 1
    swag = {"activity_label": "A", "ctx": "x", "endings": ["a", "b"], "label": "1"}
    assert FORMATS["hellaswag"]("0", from_hub(swag)).prompt == "A: x"
    copa = {"premise": "p.", "question": "effect", "choice1": "A", "choice2": "B", "label": 0}
    assert FORMATS["copa"]("0", from_hub(copa)).choices == (" a", " b")
    piqa = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
    assert FORMATS["question"]("0", from_hub(piqa)).answer == 1


def test_paper1_has_the_13_benchmarks_of_its_groups() -> None:
    named = [name for members in PAPER1_GROUPS.values() for name in members]
    assert sorted(entry.name for entry in PANELS["paper1"].entries) == sorted(named)
    assert [entry.name for entry in PANELS["sfa"].entries] == ["gsm8k", "casehold", "tos", "overruling", "humaneval"]
    assert all(entry.chance > 0 for panel in PANELS.values() for entry in panel.entries if entry.kind == "choice")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_mmlus_examples_are_the_subjects_own_and_shared(tmp_path: Path) -> None:
    write(
        tmp_path / "mmlu_test.jsonl",
        [{**ROWS["mmlu"], "subject": s, "question": f"{s}{k}"} for s in "xy" for k in (1, 2)],
    )
    write(
        tmp_path / "mmlu_dev.jsonl",
        [{**ROWS["mmlu"], "subject": s, "question": f"dev {s}"} for s in "xy" for _ in range(6)],
    )
    with pytest.warns(UserWarning, match="no data for hellaswag"):
        (task,) = load_panel("quick", local_data=tmp_path, limit=4)
    first, second = task.items[:2]
    head = "The following are multiple choice questions (with answers) about x.\n\n"
    assert first.prompt == head + "dev x\nA. a\nB. b\nAnswer: B\n\n" * 5 + "x1\nA. a\nB. b\nAnswer:"
    assert first.prompt[:-20] == second.prompt[: len(first.prompt) - 20]
    assert task.hash() == build("quick", local_data=tmp_path, limit=4).tasks[0].hash()
    (tmp_path / "mmlu_dev.jsonl").unlink()
    with pytest.raises(UserError, match="worked examples"):
        build("quick", local_data=tmp_path)


def test_limits_draw_evenly_over_groups_and_nested_by_nothing_else() -> None:
    items = [Item(str(k), "p", group="ab"[k % 2] if k < 20 else "c") for k in range(22)]
    chosen = sample_items(items, 6, seed=0)
    assert sorted(item.group for item in chosen) == list("aabbcc")
    assert chosen == sample_items(items, 6, seed=0)
    assert sample_items(items, 100, seed=0) == items


def test_rows_of_text_are_articles_and_bad_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("\n = One = \n\nsome text\n = = Part = = \nmore\n\n = Two = \nlast\n")
    assert [row["text"].split()[1] for row in read_rows(tmp_path / "w.txt")] == ["One", "Two"]
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{oops\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2"):
        list(read_rows(tmp_path / "bad.jsonl"))


def test_calibration_error_by_hand() -> None:
    assert calibration_error([0.95, 0.95, 0.55, 0.55], [1, 0, 1, 1]) == pytest.approx((0.45 + 0.45) / 2)
    assert calibration_error([1.0, 1.0], [1, 1]) == 0.0
    with pytest.raises(UserError):
        calibration_error([1.0], [1, 0])


def test_probe_and_perplexity_tables() -> None:
    rows = {"task": "p", "metric": "perplexity", "score": [10.0, 20.0], "weight": [5.0, 10.0], "words": [4.0, 8.0]}
    items = pd.DataFrame({**rows, "bytes": [20.0, 40.0], "memorization": [0.5, 1.0]})
    found = perplexities(items).iloc[0]
    assert (found["token"], found["word"], found["byte"]) == pytest.approx((np.exp(2.0), np.exp(2.5), np.exp(0.5)))
    assert found["bits_per_byte"] == pytest.approx(0.5 / np.log(2))
    assert probe_table(items)["memorization"][0] == 0.75


def test_cache_knows_the_weights_and_the_questions(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.model_dir())
    tokenizer = AutoTokenizer.from_pretrained(lab.model_dir())
    task = EvalTask("t", "choice", tuple(Item(str(k), "The boat", (" home", " away"), 0) for k in range(3)))
    first = cached_measure(model, tokenizer, [task], tmp_path)
    pd.testing.assert_frame_equal(first, cached_measure(model, tokenizer, [task], tmp_path), check_dtype=False)
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    before = model_hash(model)
    model.get_input_embeddings().weight.data[0, 0] += 1.0
    assert model_hash(model) != before
    cached_measure(model, tokenizer, [task], tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    folder = tmp_path / "out"
    save_results(folder, first, {"panel": "x"})
    assert load_results(folder)["score"].tolist() == first["score"].tolist()


def test_sample_logs_name_the_line_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "samples_copa_2026-01-02T03-04-05.1.jsonl"
    write(file, [{"doc_id": 0, "acc": 1.0, "metrics": ["acc"]}, {"doc_id": 1, "acc": 0.0, "metrics": ["acc"]}])
    rows = read_lm_eval_samples(file)
    assert (list(rows["task"]), list(rows["score"])) == (["copa", "copa"], [1.0, 0.0])
    write(file, [{"doc_id": 0, "metrics": []}])
    with pytest.raises(UserError, match=":1: no lm-eval sample"):
        read_lm_eval_samples(file)
