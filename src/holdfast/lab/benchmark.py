"""What the lab measures: the four-way benchmark "facts", held-out plain text, and the taught tasks' test splits."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from holdfast.lab.corpus import corpus, quiz_prompt
from holdfast.lab.knowledge import Fact, tested, wordings, wrong_values
from holdfast.lab.tasks import CLAUSES, examples

if TYPE_CHECKING:
    from holdfast.evaluate.tasks import EvalTask, Item

CHOICES = 4
LONGEST_ANSWER = {"math": 6, "law": 6, "code": 16}  # tokens, the end token included


def panel() -> list[EvalTask]:
    """The general abilities to watch: "facts" (choice, chance 25 %) and "text" (perplexity)."""
    return [facts_task(), text_task()]


def facts_task() -> EvalTask:
    """480 four-way questions about facts of the pretraining text, in six domains (``item.group``).

    The wrong answers are values of the same relation (other capitals for a capital) that are not right for the
    subject. Scored by the likelihood of the answer's text after the question, in the pretraining text's quiz form.
    """
    from holdfast.evaluate.tasks import EvalTask

    items = tuple(_question(fact) for fact in tested())
    return EvalTask(name="facts", kind="choice", items=items, metric="acc", chance=100 / CHOICES)


def _question(fact: Fact) -> Item:
    from holdfast.evaluate.tasks import Item

    answer = random.Random(f"place {fact.id}").randrange(CHOICES)
    choices = wrong_values(fact, CHOICES - 1)
    choices.insert(answer, fact.value)
    prompt = quiz_prompt(fact, wordings()[fact.relation].ask[0])
    return Item(id=fact.id, prompt=prompt, choices=tuple(f" {c}" for c in choices), answer=answer, group=fact.domain)


def text_task() -> EvalTask:
    """150 passages in wordings and combinations that the pretraining text doesn't have; perplexity."""
    from holdfast.evaluate.tasks import EvalTask, Item

    items = tuple(Item(id=f"heldout/{n}", prompt=text) for n, text in enumerate(corpus("heldout")))
    return EvalTask(name="text", kind="perplexity", items=items, metric="perplexity")


def eval_task(name: str) -> EvalTask:
    """Exact scoring of a taught task's test split (or, by the name "facts" or "text", a part of the panel).

    The model's greedy reply must be the completion, character for character. Chance is one over the number of labels
    for law and practically zero for math and code. Raises UserError for another name.
    """
    from holdfast.evaluate.tasks import EvalTask, Item

    for watched in panel():
        if name == watched.name:
            return watched
    items = tuple(
        Item(id=f"{name}/{n}", prompt=prompt, answer=completion.strip(), group=name)
        for n, (prompt, completion) in enumerate(examples(name, "test"))
    )
    chance = 100 / len(CLAUSES) if name == "law" else 0.0
    return EvalTask(
        name=name,
        kind="generate",
        items=items,
        metric="exact_match",
        chance=chance,
        max_new_tokens=LONGEST_ANSWER[name],
    )
