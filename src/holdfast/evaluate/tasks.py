"""What is measured: a task is a frozen list of questions, and its hash names it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

from holdfast.errors import UserError
from holdfast.files import digest

METRICS = {
    "choice": ("acc", "acc_norm", "acc_bytes"),
    "generate": ("exact_match", "numeric_match", "pass@1"),
    "perplexity": ("perplexity",),
}


@dataclass(frozen=True)
class Item:
    """One question: a prompt, and the choices to score or the answer to generate.

    ``answer`` is the index of the right choice (kind choice), the text to match (kind generate) or None
    (kind perplexity, where ``prompt`` is the whole text). ``group`` names a subset, such as a domain.
    """

    id: str
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int | str | None = None
    group: str = ""


@dataclass(frozen=True)
class EvalTask:
    """A named list of items and the rule that scores them.

    kind choice: prompt and choice are concatenated as given (the choice carries its leading space); ``acc`` takes
    the choice of highest log-likelihood, ``acc_norm`` the highest per character of the choice (as lm-eval's code;
    its documents say bytes), ``acc_bytes`` the highest per UTF-8 byte.
    kind generate: greedy text up to the first ``stop`` string or ``max_new_tokens``; ``extract`` is a regex whose last
    match's group 1 is compared with the answer, both stripped (None: the whole text); ``numeric_match`` compares
    them as numbers (1,000.0 is 1000); ``pass@1`` runs prompt + text + answer as a program, where a sandbox is given.
    kind perplexity: exp of the summed negative log-likelihood per token. ``chance`` is in percent.
    Raises UserError for an unknown kind or metric, no items, repeated ids or a bad regex.
    """

    name: str
    kind: Literal["choice", "generate", "perplexity"]
    items: tuple[Item, ...]
    metric: str = "acc"
    chance: float = 0.0
    extract: str | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise UserError(f"task '{self.name}': unknown kind '{self.kind}'. Valid: {', '.join(METRICS)}.")
        if self.metric == "acc" and self.kind != "choice":  # "acc" is only the default of kind choice
            object.__setattr__(self, "metric", METRICS[self.kind][0])
        if self.metric not in METRICS[self.kind]:
            valid = ", ".join(METRICS[self.kind])
            raise UserError(
                f"task '{self.name}': metric '{self.metric}' does not fit kind {self.kind}. Valid: {valid}."
            )
        if not self.items:
            raise UserError(f"task '{self.name}' has no items.")
        repeated = [id_ for id_, count in Counter(item.id for item in self.items).items() if count > 1]
        if repeated:
            raise UserError(f"task '{self.name}': item id '{repeated[0]}' is used more than once.")
        if self.extract is not None:
            try:
                groups = re.compile(self.extract).groups
            except re.error as error:
                raise UserError(f"task '{self.name}': extract is no valid regular expression: {error}") from error
            if groups < 1:
                raise UserError(f"task '{self.name}': extract needs a group: (…) around the answer.")

    def hash(self) -> str:
        """Short hash of everything that decides a score: two tasks with equal hashes ask the same questions."""
        return digest(asdict(self))

    def limit(self, count: int | None) -> EvalTask:
        """The same task with its first ``count`` items."""
        if count is None or count >= len(self.items):
            return self
        return EvalTask(**{**self.__dict__, "items": self.items[:count]})
