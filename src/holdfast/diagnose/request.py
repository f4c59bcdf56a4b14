"""What a diagnosis is asked for, and the text that it restores and probes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.diagnose.contamination import NGRAM, Benchmarks
from holdfast.diagnose.corpus import PASSAGE_WORDS, Passage, read_passages
from holdfast.diagnose.decomposition import MARGIN
from holdfast.diagnose.memorization import count_tokens
from holdfast.diagnose.ranking import PerplexityScorer, ScoreLog, rank
from holdfast.diagnose.restoring import RestoreSettings
from holdfast.diagnose.selection import Selection, select
from holdfast.diagnose.workbench import subject
from holdfast.errors import UserError
from holdfast.files import digest
from holdfast.models import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

    from holdfast.evaluate.tasks import EvalTask
    from holdfast.method import Method

DEFAULT_TOKENS = 1 << 18  # restoring budget where neither tuning data nor a number is given


@dataclass(frozen=True)
class Text:
    """Which text to restore and probe with, ranked by ``base``.

    ``tokens`` None: one epoch of ``tuning``, or 262,144 (or what the corpus has). Passages that share ``ngram`` words
    with ``tasks`` are left out unless ``keep_contaminated``; ``passages`` ranks only so many, from the corpus's start.
    """

    base: str
    corpus: str
    tasks: tuple[EvalTask, ...] = ()
    tuning: Dataset | None = None
    tokens: int | None = None
    column: str = "text"
    passage_words: int = PASSAGE_WORDS
    passages: int | None = None
    max_tokens: int = 512
    ngram: int = NGRAM
    keep_contaminated: bool = False


@dataclass(frozen=True, kw_only=True)
class Request(Text):
    """What to diagnose: ``checkpoints`` of a run that started from ``base``, on the questions of ``tasks``.

    ``tolerance``: restoring has worked when the probe perplexity is at most (1 + tolerance) times the base's.
    ``margin``: the smallest drop that matters, see ``decompose``.
    """

    checkpoints: tuple[str, ...]
    restoring: RestoreSettings = field(default_factory=RestoreSettings)
    methods: tuple[Method, ...] = ()
    tolerance: float = 0.1
    margin: float = MARGIN
    keep_restored: bool = True

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise UserError("no checkpoints to diagnose")
        if not self.scored:
            raise UserError("the panel has no questions with right and wrong answers; a drop can't be split")
        if not self.tolerance > 0:
            raise UserError(f"tolerance must be above 0, not {self.tolerance}")

    @property
    def scored(self) -> tuple[EvalTask, ...]:
        return tuple(task for task in self.tasks if task.kind != "perplexity")


def choose_text(wanted: Text, identity: str, out: Path, say: Callable[[str], None]) -> Selection:
    """Rank the corpus by the base's perplexity (once) and select restoring and probing text."""
    settings = {
        "base": identity,
        "corpus": wanted.corpus,
        "column": wanted.column,
        "words": wanted.passage_words,
        "passages": wanted.passages,
        "max_tokens": wanted.max_tokens,
    }
    log = ScoreLog(out / "ranking" / digest(settings), settings)
    if not log.complete:
        say(f"ranking the corpus ({len(log):,} passages are already scored)" if len(log) else "ranking the corpus")
        one = subject(wanted.base, identity, "base")
        scorer: list[PerplexityScorer] = []

        def score(texts: Sequence[str]) -> list[tuple[float, int]]:
            if not scorer:
                scorer.append(PerplexityScorer(*one.pair(), wanted.max_tokens))
            return scorer[0](texts)

        rank(_stream(wanted), score, log)
    tokens, whole = wanted.tokens, False
    if tokens is None and wanted.tuning is not None:
        tokens = count_tokens(wanted.tuning, load_tokenizer(wanted.base))
    if tokens is None:
        tokens, whole = DEFAULT_TOKENS, True
    selection = select(
        _stream(wanted),
        log,
        tokens=tokens,
        at_most=whole,
        benchmarks=Benchmarks(wanted.tasks, wanted.ngram) if wanted.tasks else None,
        keep_contaminated=wanted.keep_contaminated,
    )
    selection.save(out / "text")
    return selection


def _stream(wanted: Text) -> Iterator[Passage]:
    passages = read_passages(wanted.corpus, column=wanted.column, passage_words=wanted.passage_words)
    return islice(passages, wanted.passages)
