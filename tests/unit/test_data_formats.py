"""Formats, templates, columns, samples and splits: each row becomes what TRL takes, or an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data import fill_template, raw_rows, read_examples, train_test
from holdfast.errors import UserError


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("answer", ["output", "response"])
def test_alpaca(tmp_path: Path, answer: str) -> None:
    path = jsonl(
        tmp_path,
        {"instruction": "Add.", "input": "1 2", answer: "3"},
        {"instruction": "Greet.", "input": "", answer: "Hi"},
        {"instruction": "Go.", answer: "Gone"},
    )
    assert read_examples(path).to_list() == [
        {"prompt": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "completion": "3"},
        {"prompt": "### Instruction:\nGreet.\n\n### Response:\n", "completion": "Hi"},
        {"prompt": "### Instruction:\nGo.\n\n### Response:\n", "completion": "Gone"},
    ]
    assert read_examples(path, chat=True)[0] == {"prompt": [user("Add.\n\n1 2")], "completion": [assistant("3")]}


def test_messages_become_a_prompt_and_an_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"messages": [system("s"), user("a"), assistant("b")]})
    assert read_examples(path, format="openai").to_list() == read_examples(path, format="messages").to_list()
    assert read_examples(path).to_list() == [{"prompt": [system("s"), user("a")], "completion": [assistant("b")]}]


def test_sharegpt_with_system(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = jsonl(tmp_path, {"id": "1", "system": "s", "conversations": turns})
    assert read_examples(path).to_list() == [{"prompt": [system("s"), user("a")], "completion": [assistant("b")]}]


LONG = [system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")]


def test_every_answer_of_a_conversation_is_learned(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"messages": LONG})
    assert read_examples(path).to_list() == [
        {"prompt": LONG[:2], "completion": [assistant("b")]},
        {"prompt": LONG[:4], "completion": [assistant("d")]},
    ]
    assert read_examples(path, turns="last").to_list() == [{"prompt": LONG[:4], "completion": [assistant("d")]}]
    assert read_examples(path, turns="keep").to_list() == [{"messages": LONG}]


def test_an_answer_to_nothing_is_context_only(tmp_path: Path) -> None:
    start = [system("s"), assistant("Welcome!"), user("a"), assistant("b")]
    path = jsonl(tmp_path, {"messages": start})
    assert read_examples(path).to_list() == [{"prompt": start[:3], "completion": [assistant("b")]}]


def test_content_in_text_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = jsonl(tmp_path, {"messages": [{"role": "user", "content": parts}, assistant("c")]})
    assert read_examples(path)[0]["prompt"] == [user("ab")]


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    row = {"prompt": [user("a")], "completion": [assistant("b")]}
    assert read_examples(jsonl(tmp_path, {**row, "extra": 1})).to_list() == [row]


def test_text_and_other_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "url": "x"}, {"text": "b", "url": None})
    assert read_examples(path).to_list() == [{"text": "a"}, {"text": "b"}]


def test_user_named_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "a", "answer": "b", "id": 3})
    named = read_examples(path, columns={"prompt": "question", "completion": "answer"})
    assert named.to_list() == [{"prompt": "a", "completion": "b"}]
    body = jsonl(tmp_path, {"body": "x"})
    assert read_examples(body, columns={"text": "body"}).to_list() == [{"text": "x"}]


def test_templates(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"sentence": "It is overruled.", "label": 1}, {"sentence": "No.", "label": 0})
    dataset = read_examples(path, prompt="{sentence}\nOverruled?", completion=" {label:0=no,1=yes}")
    assert dataset.to_list() == [
        {"prompt": "It is overruled.\nOverruled?", "completion": " yes"},
        {"prompt": "No.\nOverruled?", "completion": " no"},
    ]
    chat = read_examples(path, prompt="{sentence}", completion=" {label:0=no,1=yes}", chat=True)
    assert chat[0] == {"prompt": [user("It is overruled.")], "completion": [assistant("yes")]}


def test_one_template_beside_a_column_of_the_other_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"})
    assert read_examples(path, prompt="Q: {prompt}\nA:").to_list() == [{"prompt": "Q: a\nA:", "completion": "b"}]


M = "messages"
BAD_ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "unknown columns": ([{"q": "a", "a": "b"}], {}, r"rows\.jsonl:1: the columns q, a fit no known format"),
    "later row": ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, r":2: no column 'completion'; .*: prompt"),
    "number": ([{"prompt": "a", "completion": 1}], {}, r":1: column 'completion' is a number, expected text"),
    "null": ([{"text": "a"}, {"text": None}], {}, r":2: column 'text' is nothing \(null\)"),
    "alpaca number": ([{"instruction": "a", "input": 2, "output": "b"}], {}, r":1: column 'input' is a number"),
    "template": ([{"question": "a", "answer": "b"}], {"prompt": "{qestion}", "completion": "{answer}"},
                 r":1: no column 'qestion'; there are: question, answer\. Did you mean 'question'"),
    "null in a template": ([{"a": None}], {"prompt": "x", "completion": "{a}"}, r":1: column 'a': is empty \(null\)"),
    "lone": ([{"q": "a"}], {"prompt": "{q}"}, r"a column 'completion'; there are: q\. Give `completion`"),
    "constant": ([{"q": "a"}], {"prompt": "{q}", "completion": "yes"}, r"completion 'yes': uses no column"),
    "brace": ([{"q": "a"}], {"prompt": "{q", "completion": "{q}"}, r"template '\{q'"),
    "columns": ([{"question": "a", "answer": "b"}], {"columns": {"prompt": "quesion"}}, r"Did you mean 'question'"),
    "columns turned round": ([{"q": "a", "a": "b"}], {"columns": {"q": "prompt", "a": "completion"}},
                             r"`columns` maps a role to the file's column: \{prompt: q\}"),
    "format": ([{"text": "a"}], {"format": "alpacca"}, r"format: 'alpacca' is unknown\. Did you mean 'alpaca'"),
    "format that doesn't fit": ([{"text": "a"}], {"format": "alpaca"}, r"no column 'instruction'; there are: text"),
    "turns": ([{M: [user("a"), assistant("b")]}], {"turns": "all"}, r"turns: 'all' is unknown"),
    "role": ([{M: [{"role": "usr", "content": "a"}]}], {}, r":1: messages\[0\] has the role 'usr'; known: .*user"),
    "no answer": ([{M: [user("a")]}], {}, r":1: no assistant message .*\(roles: user\)"),
    "only a greeting": ([{M: [system("s"), assistant("a")]}], {}, r"roles: system, assistant"),
    "empty": ([{M: [user("a"), assistant("b")]}, {M: []}], {}, r":2: column 'messages' is a list, expected"),
    "content": ([{M: [{"role": "user", "content": None}]}], {}, r"messages\[0\] has nothing \(null\) as its content"),
    "image": ([{M: [{"role": "user", "content": [{"type": "image"}]}]}], {}, r"a part that is not text \(image\)"),
    "not a message": ([{M: ["hello"]}], {}, r"messages\[0\] is text, expected a message"),
    "mixed": ([{"prompt": "a", "completion": "b"}, {"prompt": [user("a")], "completion": [assistant("b")]}], {},
              r":2: text here, messages in the first row"),
    "limit": ([{"text": "a"}], {"limit": 0}, r"limit: 0 is not a positive number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_line_and_column(tmp_path: Path, name: str) -> None:
    rows, arguments, message = BAD_ROWS[name]
    with pytest.raises(UserError, match=message):
        read_examples(jsonl(tmp_path, *rows), **arguments)


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{a} {{b}}", {"a": "x{y}"}, "x{y} {b}"),
        ("{a:number}", {"a": "4.0"}, "4"),
        ("{a:number}", {"a": "118,558.50"}, "118558.5"),
        ("{a:number}", {"a": -3}, "-3"),
        ("{a:number}", {"a": 100}, "100"),
        ("{a:number}", {"a": " B "}, "B"),
        ("{a:number}", {"a": "1.2.0"}, "1.2.0"),
        ("{a:letter}", {"a": 2}, "C"),
        ("{a:lettered}", {"a": ["x", "y"]}, "A. x\nB. y"),
        ("{a[1]}", {"a": ["x", "y"]}, "y"),
        ("{a[k]}", {"a": {"k": "v"}}, "v"),
        ("{a:.2f}", {"a": 0.125}, "0.12"),
        ("{a:0=no, sir,1=yes}", {"a": 0}, "no, sir"),
        ("{a:true=yes,False=no}", {"a": False}, "no"),
        ("{a:0=no,1=yes}", {"a": True}, "yes"),
        ("{a:=>3}", {"a": 1}, "==1"),
        ("{two words}", {"two words": "x"}, "x"),
    ],
)
def test_template_fields(template: str, row: dict[str, Any], text: str) -> None:
    assert fill_template(template, row) == text


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{a:0=no,1=yes}", {"a": 2}, r"row 3: column 'a': 2 is none of 0, 1"),
        ("{a:letter}", {"a": 26}, r"26 has no letter"),
        ("{a:letter}", {"a": "x"}, r"column 'a': \{a:letter\} doesn't fit 'x'"),
        ("{a:lettered}", {"a": "x"}, r"'x' is not a list"),
        ("{a[3]}", {"a": ["x"]}, r"column 'a': .* doesn't fit"),
        ("{a:.2f}", {"a": "x"}, r"doesn't fit 'x'"),
        ("{}", {"a": "x"}, r"a field needs a column's name"),
        ("a}", {"a": "x"}, r"write \{\{ and \}\}"),
    ],
)
def test_template_mistakes(template: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill_template(template, row, "row 3")


@given(st.text(), st.text())
@settings(max_examples=50, deadline=None)
def test_a_plain_field_is_the_value_whatever_it_holds(before: str, value: str) -> None:
    template = before.replace("{", "{{").replace("}", "}}") + "{a}"
    assert fill_template(template, {"a": value}) == before + value


# ---------------------------------------------------------------- samples and splits


def test_limit_draws_a_seeded_subset_in_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": str(i)} for i in range(100)))
    drawn = [int(text) for text in read_examples(path, limit=10, seed=1)["text"]]
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn)
    assert drawn == [int(row["text"]) for row in raw_rows(path, limit=10, seed=1)]
    assert drawn != [int(text) for text in read_examples(path, limit=10, seed=2)["text"]]
    assert len(read_examples(path, limit=1000)) == 100


def test_limit_is_uniform_over_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": str(i)} for i in range(20)))
    counts = [0] * 20
    for seed in range(600):
        for row in raw_rows(path, limit=5, seed=seed):
            counts[int(row["text"])] += 1
    assert max(abs(count - 150) for count in counts) < 50  # 600 * 5 / 20; the standard deviation is 10.6


def test_train_test_split_is_a_partition(tmp_path: Path) -> None:
    dataset = read_examples(jsonl(tmp_path, *({"text": str(i)} for i in range(50))))
    train, test = train_test(dataset, 0.2, seed=3)
    assert (len(train), len(test)) == (40, 10)
    assert sorted([*train["text"], *test["text"]]) == sorted(dataset["text"])
    assert train_test(dataset, 10, seed=3)[1]["text"][:] == test["text"][:]
    assert train_test(dataset, 10, seed=4)[1]["text"][:] != test["text"][:]
    for wrong in (0, 50, 0.001):
        with pytest.raises(UserError, match="leaves an empty part"):
            train_test(dataset, wrong)


def test_parts_of_a_file_are_those_of_a_hub_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": str(i)} for i in range(11)))
    hub = [int(text) for text in load_dataset("json", data_files=str(path), split="train[:65%]")["text"]]
    assert [int(row["text"]) for row in raw_rows(path, split="train[:65%]")] == hub
    rest = [int(row["text"]) for row in raw_rows(path, split="[65%:]")]
    assert hub + rest == list(range(11))
    assert [row["text"] for row in raw_rows(path, split="[-2:]")] == ["9", "10"]
    assert [row["text"] for row in raw_rows(path, split="[3:5]")] == ["3", "4"]
    assert read_examples(path, split="[65%:]")["text"][:] == [str(i) for i in rest]
    with pytest.raises(UserError, match="no rows"):
        read_examples(path, split="[20:]")


def test_chunks_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.data.read.CHUNK", 3)
    rows = [{"prompt": str(i), "completion": str(-i)} for i in range(8)]
    assert read_examples(jsonl(tmp_path, *rows)).to_list() == rows
    path = jsonl(tmp_path, *rows, {"prompt": [user("a")], "completion": [assistant("b")]})
    with pytest.raises(UserError, match=r"rows\.jsonl:9: text here"):
        read_examples(path)
