"""Token trees: a continuation's ancestors are its own prefix, no prefix is held twice, trunks are strict prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.evaluate.tree import MIN_TRUNK, Question, batches, build_row, common_prefix, trunks

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


@settings(max_examples=200, deadline=None)
@given(tokens, st.lists(tokens, min_size=1, max_size=5))
def test_each_pair_sees_exactly_its_own_prefix(context: tuple[int, ...], continuations: list[tuple[int, ...]]) -> None:
    row = build_row(0, Question(context, tuple(continuations)))
    seen: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for node, target, index in row.pairs:
        ancestors = [j for j in range(node + 1) if j <= node < row.end[j]]
        path = tuple(row.tokens[j] for j in ancestors)
        assert [row.positions[j] for j in ancestors] == list(range(len(path)))
        seen.setdefault(index, []).append((path, target))
    for index, continuation in enumerate(continuations):
        expected = [(context + continuation[:k], token) for k, token in enumerate(continuation)]
        assert sorted(seen[index], key=lambda pair: len(pair[0])) == expected


@settings(max_examples=100, deadline=None)
@given(tokens, st.lists(tokens, min_size=1, max_size=5))
def test_no_prefix_is_held_twice(context: tuple[int, ...], continuations: list[tuple[int, ...]]) -> None:
    row = build_row(0, Question(context, tuple(continuations)))
    prefixes = {c[:k] for c in continuations for k in range(1, len(c))}
    assert len(row) == len(context) + len(prefixes)


def test_a_long_shared_chain_needs_no_recursion() -> None:
    chain = tuple(range(5000))
    row = build_row(0, Question((1,), ((*chain, 1), (*chain, 2))))
    assert len(row) == 1 + 5000


def test_common_prefix() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((1, 2), (1, 2, 3)) == 2
    assert common_prefix((5,), (1,)) == 0


def test_trunks_are_strict_prefixes_that_save() -> None:
    shots = [tuple(range(100 * k, 100 * k + 60)) for k in (1, 2)]
    contexts = [(*shots[k % 2], 7, k) for k in range(8)] + [(9, 9, k) for k in range(3)]
    groups = trunks(contexts, cost=10)
    covered = sorted(i for _, members in groups for i in members)
    assert covered == list(range(len(contexts)))
    by_trunk = dict(groups)
    assert set(by_trunk) == {(), (*shots[0], 7), (*shots[1], 7)}
    for trunk, members in groups:
        assert all(contexts[i][: len(trunk)] == trunk and len(contexts[i]) > len(trunk) for i in members)


def test_a_shared_prefix_that_is_too_short_or_too_dear_is_repeated() -> None:
    short = [(*range(MIN_TRUNK - 1), k) for k in range(50, 60)]
    assert trunks(short, cost=0) == [((), list(range(10)))]
    two = [(*range(40), k) for k in (50, 60)]
    assert [trunk for trunk, _ in trunks(two, cost=50)] == [()]
    assert [trunk for trunk, _ in trunks(two, cost=10)] == [tuple(range(40))]


def test_identical_contexts_keep_their_last_token() -> None:
    same = [tuple(range(40))] * 3
    ((trunk, members),) = trunks(same, cost=0)
    assert trunk == tuple(range(39))
    assert sorted(members) == [0, 1, 2]


@pytest.mark.parametrize("share", [True, False])
def test_batches_hold_every_question_within_the_budget(share: bool) -> None:
    generator = np.random.default_rng(0)
    asked = [
        Question(tuple(generator.integers(0, 9, size)), ((1, 2, 3), (4, 5))) for size in generator.integers(1, 80, 40)
    ]
    plan = batches(asked, 128, share=share)
    assert sorted({row.question for batch in plan for row in batch.rows}) == list(range(40))
    for batch in plan:
        assert len(batch.rows) == 1 or len(batch.rows) * batch.width <= 128
    assert max(len(batch.rows) for batch in batches(asked, 10_000, most=3)) == 3
