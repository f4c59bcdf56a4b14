"""Hostile items give a per-item error or a truncation count; one bad item never loses a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import lab
from holdfast.errors import UserError
from holdfast.evaluate import EvalTask, Item, measure, summarize
from holdfast.evaluate.text import max_length

GOOD = Item("good", "The boat came", (" home", " away"), 0)


@pytest.fixture(scope="module")
def pair() -> Any:
    return AutoModelForCausalLM.from_pretrained(lab.model_dir()), AutoTokenizer.from_pretrained(lab.model_dir())


def test_bad_choice_items_are_named_and_the_rest_is_scored(pair: Any) -> None:
    alone = measure(*pair, [EvalTask("t", "choice", (GOOD,))]).iloc[0]
    bad = {
        "no choices": Item("a", "x", (), 0),
        "choice 1 is empty": Item("b", "x", (" y", ""), 0),
        "answer 2 is out of range": Item("c", "x", (" y", " z"), 2),
        "answer -1 is out of range": Item("d", "x", (" y", " z"), -1),
        "answer 'y' is no index": Item("e", "x", (" y", " z"), "y"),
        "answer None is no index": Item("f", "x", (" y", " z"), None),
        "answer True is no index": Item("g", "x", (" y", " z"), True),
        "can't be tokenized": Item("h", "a lone surrogate \ud800", (" y", " z"), 0),
        "the continuation alone has": Item("i", "x", (" y", " far" * 10_000), 0),
    }
    items = measure(*pair, [EvalTask("t", "choice", (*bad.values(), GOOD))]).set_index("item")
    for message, item in bad.items():
        assert message in items.loc[item.id, "error"]
        assert np.isnan(items.loc[item.id, "score"])
    assert items.loc["good", "error"] == ""
    assert items.loc["good", "logprobs"] == pytest.approx(alone["logprobs"], abs=1e-4)
    summary = summarize(items.reset_index()).iloc[0]
    assert (summary["n"], summary["errors"]) == (1, len(bad))


def test_a_10k_token_context_is_cut_and_counted(pair: Any) -> None:
    limit = max_length(*pair)
    long = Item("long", "sea " * 10_000, (" boat", " fish and a boat"), 0)
    row = measure(*pair, [EvalTask("t", "choice", (long, GOOD))]).iloc[0]
    whole = len(pair[1](long.prompt.rstrip())["input_ids"])
    assert row["error"] == ""
    assert row["truncated"] >= whole - limit > 0
    assert np.isfinite(row["logprobs"]).all()
    made = EvalTask("g", "generate", (Item("0", long.prompt, (), "x"),), max_new_tokens=3)
    assert measure(*pair, [made]).iloc[0]["truncated"] > 0


def test_duplicate_choices_are_one_answer(pair: Any) -> None:
    task = EvalTask("t", "choice", tuple(Item(str(k), "The boat came", (" home", " home"), k) for k in (0, 1)))
    items = measure(*pair, [task])
    assert list(items["score"]) == [1.0, 1.0]
    assert items["logprobs"][0][0] == items["logprobs"][0][1]


def test_unicode_and_empty_prompts_are_scored(pair: Any) -> None:
    texts = ["", " ", "\n\n", "日本語 🌊", "e\u0301\u200d\u202e", "\x00null"]
    task = EvalTask("t", "choice", tuple(Item(str(k), p, (" 🌊", " naïve"), 0) for k, p in enumerate(texts)))
    items = measure(*pair, [task])
    assert (items["error"] == "").all()
    assert np.isfinite(np.stack(items["logprobs"].to_list())).all()


def test_bad_generation_and_perplexity_items(pair: Any) -> None:
    made = EvalTask("g", "generate", (Item("0", "x", (), None), Item("1", "\ud800", (), "y"), Item("2", "", (), "y")))
    found = measure(*pair, [made])
    assert list(found["error"] != "") == [True, True, False]
    texts = EvalTask("p", "perplexity", (Item("0", ""), Item("1", "the sea")))
    found = measure(*pair, [texts])
    assert found["error"][0] == "empty text"
    assert summarize(found)["n"][0] == 1
    too_long = EvalTask("g", "generate", (Item("0", "x", (), "y"),), max_new_tokens=10**6)
    assert "leaves no room" in measure(*pair, [too_long])["error"][0]


def test_programs_are_refused_without_a_sandbox(pair: Any) -> None:
    task = EvalTask("h", "generate", (Item("0", "x = 1\n", (), "assert x == 1"),), metric="pass@1")
    with pytest.raises(UserError, match="sandbox"):
        measure(*pair, [task])


@pytest.mark.parametrize(
    "make",
    [
        lambda: EvalTask("t", "chooice", (GOOD,)),  # type: ignore[arg-type]
        lambda: EvalTask("t", "choice", ()),
        lambda: EvalTask("t", "choice", (GOOD, GOOD)),
        lambda: EvalTask("t", "choice", (GOOD,), metric="bleu"),
        lambda: EvalTask("t", "generate", (GOOD,), extract="("),
        lambda: EvalTask("t", "generate", (GOOD,), extract=r"\d+"),
    ],
)
def test_tasks_that_make_no_sense_are_user_errors(make: Any) -> None:
    with pytest.raises(UserError, match="task 't'"):
        make()


def test_a_tasks_hash_knows_its_questions() -> None:
    task = EvalTask("t", "choice", (GOOD,))
    assert task.hash() == EvalTask("t", "choice", (GOOD,)).hash()
    assert task.hash() != EvalTask("t", "choice", (Item("good", "The boat came", (" home", " away"), 1),)).hash()
