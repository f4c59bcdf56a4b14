"""Rows of well-known benchmark files as items: one small function per benchmark, no task-specific code elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from holdfast.evaluate.tasks import Item

Row = Mapping[str, Any]
Format = Callable[[str, Row], Item]
LETTERS = "ABCDEFGHIJ"


def _index(row: Row, key: str = "answer") -> int:
    """The right choice's index, from an index, a letter, or a boolean."""
    answer = row[key]
    if isinstance(answer, str) and answer.strip() in LETTERS and answer.strip():
        return LETTERS.index(answer.strip())
    return int(answer)


def _choices(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(" " + str(text).strip() for text in texts)


def question(id_: str, row: Row) -> Item:
    """question, choices, answer (ARC, OpenBookQA, PIQA): "Question: …\\nAnswer:" and each choice's text."""
    return Item(id_, f"Question: {row['question']}\nAnswer:", _choices(row["choices"]), _index(row))


def stem(id_: str, row: Row) -> Item:
    """question, choices, answer, and perhaps fact1 (OpenBookQA): the question is a sentence to continue."""
    fact = f"{row['fact1']}\n" if row.get("fact1") else ""
    return Item(id_, f"{fact}{row['question']}", _choices(row["choices"]), _index(row))


def hellaswag(id_: str, row: Row) -> Item:
    """context, choices, answer: each ending continues the context."""
    return Item(id_, str(row["context"]).strip(), _choices(row["choices"]), _index(row))


def mmlu(id_: str, row: Row) -> Item:
    """subject, question, choices, answer: lettered choices, the letter is scored."""
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"]))
    labels = tuple(f" {LETTERS[k]}" for k in range(len(row["choices"])))
    return Item(id_, f"{str(row['question']).strip()}\n{listed}Answer:", labels, _index(row), str(row["subject"]))


def copa(id_: str, row: Row) -> Item:
    """premise, question (cause or effect), choices, answer: the premise joined to each alternative."""
    joiner = {"cause": "because", "effect": "therefore"}[row["question"]]
    endings = [text[0].lower() + text[1:] for text in row["choices"]]
    return Item(id_, f"{str(row['premise']).strip().rstrip('.')} {joiner}", _choices(endings), _index(row))


def boolq(id_: str, row: Row) -> Item:
    """passage, question, answer (bool)."""
    text = f"{row['passage']}\nQuestion: {str(row['question']).rstrip('?')}?\nAnswer:"
    return Item(id_, text, (" no", " yes"), int(bool(row["answer"])))


def entailment(id_: str, row: Row) -> Item:
    """premise, hypothesis (or sentence1, sentence2), label 0 = entailed (RTE, AX-b, AX-g)."""
    premise, hypothesis = row.get("premise") or row["sentence1"], row.get("hypothesis") or row["sentence2"]
    text = f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    return Item(id_, text, (" True", " False"), _index(row, "label"))


def siqa(id_: str, row: Row) -> Item:
    """context, question, choices (or answerA, answerB, answerC), answer (or label, from 1)."""
    choices = row["choices"] if "choices" in row else [row[f"answer{letter}"] for letter in "ABC"]
    answer = _index(row) if "answer" in row else int(row["label"]) - 1
    return Item(id_, f"Q: {row['context']} {row['question']}\nA:", _choices(choices), answer)


def race(id_: str, row: Row) -> Item:
    """article, question, options (or choices), answer (letter or index)."""
    choices = row["choices"] if "choices" in row else row["options"]
    text = f"Article: {row['article']}\n\nQuestion: {row['question']}\nAnswer:"
    return Item(id_, text, _choices(choices), _index(row))


def csl(id_: str, row: Row) -> Item:
    """abst, keyword (list), label 1 = all keywords are the abstract's (CLUE's CSL, Chinese)."""
    keywords = "、".join(row["keyword"])
    text = f"摘要：{row['abst']}\n关键词：{keywords}\n问题：上述关键词是否都是该摘要的关键词？\n答案："
    return Item(id_, text, ("否", "是"), _index(row, "label"))


def casehold(id_: str, row: Row) -> Item:
    """citing_prompt, holding_0 … holding_4, label: which holding is cited."""
    holdings = [row[f"holding_{k}"] for k in range(5)]
    return Item(id_, f"{str(row['citing_prompt']).strip()}\nHolding:", _choices(holdings), _index(row, "label"))


def overruling(id_: str, row: Row) -> Item:
    """sentence, label 1 = overrules an earlier decision."""
    text = f"Sentence: {row['sentence']}\nQuestion: Does this sentence overrule an earlier decision?\nAnswer:"
    return Item(id_, text, (" no", " yes"), _index(row, "label"))


def tos(id_: str, row: Row) -> Item:
    """text (or sentence), label 1 = potentially unfair (Claudette's terms of service)."""
    clause = row.get("text") or row["sentence"]
    text = f"Clause: {clause}\nQuestion: Is this clause of the terms of service potentially unfair?\nAnswer:"
    return Item(id_, text, (" no", " yes"), _index(row, "label"))


def gsm8k(id_: str, row: Row) -> Item:
    """question, answer whose last line is "#### number"."""
    return Item(id_, f"Question: {row['question']}\nAnswer:", (), str(row["answer"]).rsplit("####", 1)[-1].strip())


def humaneval(id_: str, row: Row) -> Item:
    """task_id, prompt, test, entry_point; the answer is the program that checks a completion."""
    check = f"\n{row['test']}\ncheck({row['entry_point']})\n"
    return Item(str(row.get("task_id", id_)), str(row["prompt"]), (), check, str(row["entry_point"]))


def text(id_: str, row: Row) -> Item:
    """text: a document whose perplexity is measured."""
    return Item(id_, str(row["text"]))


FORMATS: dict[str, Format] = {
    "question": question,
    "stem": stem,
    "hellaswag": hellaswag,
    "mmlu": mmlu,
    "copa": copa,
    "boolq": boolq,
    "entailment": entailment,
    "siqa": siqa,
    "race": race,
    "csl": csl,
    "casehold": casehold,
    "overruling": overruling,
    "tos": tos,
    "gsm8k": gsm8k,
    "humaneval": humaneval,
    "text": text,
}


def solution(format_: str, item: Item, row: Row) -> str:
    """How a worked example ends after its prompt: the right choice, or the worked answer."""
    if item.choices:
        return item.choices[int(item.answer or 0)]
    if format_ == "gsm8k":
        return " " + str(row["answer"])
    if format_ == "humaneval":
        return str(row["canonical_solution"])
    return ""
