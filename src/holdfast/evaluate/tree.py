"""Token trees: no prefix twice. Questions become rows whose tokens each see only their own ancestors.

A row lists the nodes of a token tree in depth-first order, so the tokens that may see node j are exactly those from j
to the end of its subtree: node i sees node j if and only if j <= i < end[j]. One integer per token is the whole block
mask. The last token of a continuation is never an input: only its log-probability is wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
MIN_TRUNK = 16  # tokens: a shared prefix shorter than this is cheaper to repeat than to cache


@dataclass(frozen=True)
class Question:
    """A context of at least one token and the continuations (each at least one token) to score after it."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] = ()  # vocabulary ids whose probability mass right after the context is wanted


@dataclass
class Row:
    """A token tree in depth-first order, behind a trunk of ``trunk`` tokens that the row does not hold.

    ``pairs`` are (node, target token, continuation): the log-probability of target given node belongs to that
    continuation of question ``question``.
    """

    question: int
    tokens: list[int]
    positions: list[int]
    end: list[int]
    pairs: list[tuple[int, int, int]]
    context_node: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every token follows the one before it, from position 0: plain causal text."""
        return self.end == [len(self)] * len(self) and self.positions == list(range(len(self)))

    @property
    def scored(self) -> int:
        """Nodes whose logits are needed."""
        return len({node for node, _, _ in self.pairs})


@dataclass(frozen=True)
class Limits:
    """What one forward may hold: tokens, cached keys, rows, positions with logits (None: any)."""

    tokens: int
    memory: int | None
    rows: int | None
    heads: int | None

    def allow(self, rows: int, width: int, trunk: int, scored: int) -> bool:
        """Whether so many rows of that width, behind that trunk, fit in one forward."""
        return (
            rows * width <= self.tokens
            and (self.memory is None or rows * (trunk + width) <= self.memory)
            and (self.rows is None or rows <= self.rows)
            and (self.heads is None or scored <= self.heads)
        )


@dataclass
class Batch:
    """Rows that run in one forward, after the same trunk (a prefix already in the cache)."""

    trunk: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)

    @property
    def width(self) -> int:
        return max(len(row) for row in self.rows)


def build_row(question: int, asked: Question, trunk: int = 0) -> Row:
    """The tree of one question: its context as a chain, its continuations merged where they start alike."""
    context = asked.context[trunk:]
    row = Row(
        question=question,
        tokens=list(context),
        positions=list(range(trunk, trunk + len(context))),
        end=[0] * len(context),
        pairs=[],
        context_node=len(context) - 1,
    )
    _grow(row, row.context_node, [(k, tokens) for k, tokens in enumerate(asked.continuations)], 0, trunk + len(context))
    row.end[: len(context)] = [len(row.tokens)] * len(context)
    return row


def _grow(row: Row, node: int, branches: list[tuple[int, tuple[int, ...]]], depth: int, position: int) -> None:
    """Add the continuations' tokens below ``node``; recursion only where they part, for a chain may be very long."""
    chain = []
    while True:
        children: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for index, tokens in branches:
            row.pairs.append((node, tokens[depth], index))
            if len(tokens) > depth + 1:
                children.setdefault(tokens[depth], []).append((index, tokens))
        if len(children) != 1:
            break
        ((token, branches),) = children.items()
        node = _add(row, token, position)
        chain.append(node)
        depth, position = depth + 1, position + 1
    for token, below in children.items():
        child = _add(row, token, position)
        _grow(row, child, below, depth + 1, position + 1)
        row.end[child] = len(row.tokens)
    for above in chain:
        row.end[above] = len(row.tokens)


def _add(row: Row, token: int, position: int) -> int:
    row.tokens.append(token)
    row.positions.append(position)
    row.end.append(0)
    return len(row.tokens) - 1


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that a and b share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # a[:low] == b[:low] and a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def trunks(contexts: Sequence[tuple[int, ...]], cost: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Group contexts behind the shared prefixes that save the most tokens: [(trunk, indices)], trunk () for the rest.

    A trunk of P tokens before n contexts saves (n − 1)·P tokens and costs ``cost`` tokens' worth of an extra, smaller
    forward. A trunk is shorter than every context behind it: the last context token must still be run.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i])
    shared = [
        min(common_prefix(contexts[a], contexts[b]), len(contexts[a]) - 1, len(contexts[b]) - 1)
        for a, b in itertools.pairwise(order)
    ]
    groups: list[tuple[tuple[int, ...], list[int]]] = []
    rest: list[int] = []
    for low, high, length in _best_blocks(np.asarray(shared, dtype=np.int64), len(order), cost):
        if length:
            groups.append((contexts[order[low]][:length], order[low:high]))
        else:
            rest.extend(order[low:high])
    return [((), rest), *groups] if rest else groups


def _best_blocks(shared: Ints, count: int, cost: int) -> list[tuple[int, int, int]]:
    """Split 0..count into blocks (low, high, trunk length) of the greatest saving."""

    def solve(low: int, high: int, depth: int) -> tuple[int, list[tuple[int, int, int]]]:
        inside = shared[low : high - 1]
        least = int(inside.min()) if len(inside) else 0
        whole = (high - low - 1) * least - cost if least >= MIN_TRUNK else 0
        if high - low < 2 or (whole > 0 and (inside == least).all()) or depth > 200:
            return (whole, [(low, high, least)]) if whole > 0 else (0, [(low, high, 0)])
        if int(inside.max()) < MIN_TRUNK:
            return 0, [(low, high, 0)]
        cuts = [low, *(low + 1 + np.flatnonzero(inside == least)).tolist(), high]
        saved, blocks = 0, []
        for a, b in itertools.pairwise(cuts):
            gain, inner = solve(a, b, depth + 1)
            saved += gain
            blocks.extend(inner)
        return (whole, [(low, high, least)]) if whole >= saved and whole > 0 else (saved, blocks)

    return solve(0, count, 0)[1] if count else []


def batches(
    questions: Sequence[Question],
    budget: int,
    *,
    share: bool = True,
    cost: int = 64,
    memory: int | None = None,
    most: int | None = None,
    heads: int | None = None,
) -> list[Batch]:
    """Plan the forwards: trunks, then rows of like length, at most ``budget`` tokens (padding included) each.

    ``memory`` bounds rows × (trunk + width), the cached keys of one forward; ``most`` the rows; ``heads`` the
    positions whose logits are made. Without ``share`` each continuation is a row of its own, for models that take no
    block mask.
    """
    if not share:
        rows = [
            Row(q, [*asked.context, *tokens[:-1]], [], [], _chain_pairs(asked, k), len(asked.context) - 1)
            for q, asked in enumerate(questions)
            for k, tokens in enumerate(asked.continuations)
        ]
        return _pack((), rows, Limits(budget, None, most, heads))
    plan: list[Batch] = []
    for trunk, members in trunks([asked.context for asked in questions], cost):
        rows = [build_row(q, questions[q], len(trunk)) for q in members]
        plan.extend(_pack(trunk, rows, Limits(budget, memory, most, heads)))
    return plan


def _chain_pairs(asked: Question, k: int) -> list[tuple[int, int, int]]:
    start = len(asked.context) - 1
    return [(start + i, target, k) for i, target in enumerate(asked.continuations[k])]


def _pack(trunk: tuple[int, ...], rows: list[Row], limits: Limits) -> list[Batch]:
    """Longest rows first, so that the first batch shows at once whether the budget fits the memory."""
    plan: list[Batch] = []
    scored = 0
    for row in sorted(rows, key=len, reverse=True):
        needed = row.scored
        if plan and limits.allow(len(plan[-1].rows) + 1, len(plan[-1].rows[0]), len(trunk), scored + needed):
            plan[-1].rows.append(row)
            scored += needed
        else:
            plan.append(Batch(trunk, [row]))
            scored = needed
    return plan
