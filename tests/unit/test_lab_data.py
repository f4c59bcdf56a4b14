"""The lab's facts, texts and tasks: true to themselves, disjoint where they must be, the same on every machine."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from holdfast import lab
from holdfast.errors import UserError
from holdfast.lab.corpus import quiz_prompt
from holdfast.lab.knowledge import DOMAINS, FOLDER, TESTED, accepted, facts, sentence, untested, wordings
from holdfast.lab.knowledge import tested as asked
from holdfast.lab.tasks import CLAUSES, TASKS, TEST, TRAIN, examples


def fingerprint(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_tables_are_rectangular_and_keys_are_unique() -> None:
    for table in DOMAINS:
        rows = [line.split("\t") for line in (FOLDER / f"{table}.tsv").read_text(encoding="utf-8").splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}, table
        assert not [key for key, count in Counter(row[0] for row in rows).items() if count > 1], table
        assert all(cell == cell.strip() and cell for row in rows for cell in row), table


def test_one_to_one_relations_have_no_value_twice() -> None:
    for relation in (
        "countries.capital",
        "countries.domain",
        "elements.symbol",
        "elements.number",
        "states.capital",
        "states.code",
        "units.unit",
    ):
        values = [fact.value for fact in facts() if fact.relation == relation]
        assert len(values) == len(set(values)), relation


def test_elements_are_the_periodic_table_in_order() -> None:
    numbers = [int(fact.value) for fact in facts() if fact.relation == "elements.number"]
    assert numbers == list(range(1, 104))


def test_there_is_enough_of_everything() -> None:
    per_relation = Counter(fact.relation for fact in facts())
    assert per_relation["countries.capital"] >= 120
    assert len({fact.domain for fact in asked()}) >= 4
    assert len(asked()) == sum(TESTED.values()) >= 300
    assert len({fact.id for fact in facts()}) == len(facts())
    assert len(asked()) + len(untested()) == len(facts())
    for relation in per_relation:
        assert len(wordings()[relation].say) >= 6
        assert len(wordings()[relation].ask) >= 3
        assert wordings()[relation].kept


def test_every_wording_names_the_subject_and_the_value() -> None:
    for wording in wordings().values():
        for template in wording.say + wording.kept:
            assert ("{s}" in template or "{as}" in template) and ("{v}" in template or "{av}" in template)
        for template in wording.ask:
            assert ("{s}" in template or "{as}" in template) and "{v}" not in template


def test_benchmark_has_four_different_choices_of_which_one_is_right() -> None:
    by_id = {fact.id: fact for fact in facts()}
    task = lab.eval_task("facts")
    assert task.chance == 25.0
    for item in task.items:
        fact, choices = by_id[item.id], [choice.removeprefix(" ") for choice in item.choices]
        assert len(set(choices)) == 4
        assert isinstance(item.answer, int) and choices[item.answer] == fact.value
        assert [choice for choice in choices if choice in accepted(fact)] == [fact.value]
    places = Counter(item.answer for item in task.items)
    assert min(places.values()) > len(task.items) / 4 * 0.7  # no position gives the answer away


def test_benchmark_prompts_are_questions_with_one_answer() -> None:
    prompts = Counter(item.prompt for item in lab.eval_task("facts").items)
    assert max(prompts.values()) == 1


def test_heldout_text_is_in_no_training_passage() -> None:
    train = "\n".join(lab.corpus("train"))
    heldout = list(lab.corpus("heldout"))
    assert len(set(heldout)) == len(heldout) >= 100
    assert not [text for text in heldout if text in train]


def test_restoring_text_never_states_a_benchmark_fact() -> None:
    text = "\n".join(lab.corpus("restore"))
    questions = {quiz_prompt(fact, ask) for fact in asked() for ask in wordings()[fact.relation].ask}
    assert not [question for question in questions if question in text]
    sentences = set(re.split(r"(?<=\.) (?=[A-Z])", text.replace("\n", " ")))
    stated = {sentence(say, fact) for fact in asked() for say in wordings()[fact.relation].say}
    assert len(sentences) > 4000 and not sentences & stated


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_splits_are_disjoint_and_whole(name: str) -> None:
    train, test = examples(name, "train"), examples(name, "test")
    assert (len(train), len(test)) == (TRAIN, TEST)
    prompts = [prompt for prompt, _ in train + test]
    assert len(set(prompts)) == len(prompts)
    assert all(completion.startswith(" ") and completion.strip() for _, completion in train + test)


def test_math_answers_are_right() -> None:
    for prompt, completion in examples("math", "train"):
        first, second = map(int, re.findall(r"\d+", prompt))
        assert int(completion) == (first - second if "left?" in prompt else first + second)


def test_law_labels_are_balanced() -> None:
    labels = Counter(completion.strip() for _, completion in examples("law", "train"))
    assert set(labels) == set(CLAUSES)
    assert min(labels.values()) > TRAIN / len(CLAUSES) * 0.7


def test_code_answers_compile() -> None:
    for _, completion in examples("code", "train"):
        compile(completion.strip(), "<lab>", "eval")


def test_data_is_the_same_everywhere() -> None:
    made = {name: fingerprint([p + c for s in ("train", "test") for p, c in examples(name, s)]) for name in TASKS}
    made |= {split: fingerprint(list(lab.corpus(split))) for split in ("train", "heldout", "restore")}
    made |= {task.name: task.hash() for task in lab.panel()}
    assert made == PINNED


PINNED: dict[str, str] = {
    "math": "675290e95cef24fb",
    "law": "ad17eb89cf6f062f",
    "code": "ff1a4596fd1a1475",
    "train": "74ed327d2434134f",
    "heldout": "a5592b5c271be526",
    "restore": "036501adf27c7825",
    "facts": "075904e0ad7acc8f",
    "text": "63605de0dc0478f1",
}


def test_contradictions_overwrite_exactly_the_named_items() -> None:
    data, ids = lab.contradictions(12, seed=3)
    items = {item.id: item for item in lab.eval_task("facts").items}
    assert len(set(ids)) == 12 and set(ids) <= set(items)
    assert len(data) == 36
    taught = {row["completion"] for row in data}
    for id_ in ids:
        item = items[id_]
        assert taught & {choice for place, choice in enumerate(item.choices) if place != item.answer}
    again, same = lab.contradictions(12, seed=3)
    assert same == ids and again[:] == data[:]
    assert lab.contradictions(12, seed=4)[1] != ids


def test_instructions_touch_no_benchmark_fact() -> None:
    data = lab.instructions(400, seed=1)
    assert len(data) == 400
    questions = {wordings()[fact.relation].ask[0].format(s=fact.subject, **{"as": ""}) for fact in asked()}
    text = "\n".join(data["prompt"])
    assert not [question for question in questions if len(question) > 20 and question[1:] in text]
    assert lab.instructions(400, seed=1)[:] == data[:]


@pytest.mark.parametrize("call", [lambda: lab.load_task("maths"), lambda: lab.eval_task("maths")])
def test_unknown_task_names_the_nearest(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="Did you mean 'math'"):
        call()


def test_unknown_splits_and_counts_are_refused() -> None:
    with pytest.raises(UserError, match="heldout"):
        lab.corpus("held-out")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="split"):
        lab.load_task("math", "validation")
    with pytest.raises(UserError, match="n_facts"):
        lab.contradictions(10_000)
