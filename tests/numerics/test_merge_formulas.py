"""The merge formulas against plain references, and their laws, over random shapes, dtypes and weights."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from holdfast.errors import UserError
from holdfast.merge import (
    dare,
    fisher,
    linear,
    magnitude_prune,
    negation,
    slerp,
    task_arithmetic,
    ties,
    wise_ft,
)
from holdfast.merge import thresholds as thresholds_module
from holdfast.merge.formulas import combine
from holdfast.merge.numbers import decode, encode, finite
from holdfast.merge.scratch import LINE, Scratch

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
few = settings(max_examples=25, deadline=None)


def tensors(
    seed: int, count: int, shape: tuple[int, ...], dtype: torch.dtype, step: float = 0.02
) -> list[torch.Tensor]:
    """A base and models near it, as fine-tuning leaves them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    others = [base + step * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    return [one.to(dtype) for one in (base, *others)]


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units of the last place (both of a 16-bit float type, or float32)."""
    kind = torch.int16 if a.element_size() == 2 else torch.int32

    def order(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(kind).long()
        low = -(1 << (8 * x.element_size() - 1))
        return torch.where(bits < 0, low - bits, bits)

    return int((order(a) - order(b)).abs().max()) if a.numel() else 0


def plain_trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the int(density·n) largest magnitudes, the first of equal ones."""
    flat = delta.flatten()
    keep = max(1, int(density * flat.numel()))
    kept = torch.zeros_like(flat)
    index = torch.sort(flat.abs(), descending=True, stable=True).indices[:keep]
    kept[index] = flat[index]
    return kept.view_as(delta)


def plain_ties(base, tuned, weights, density, scale=1.0):
    """Trim, elect by mass, disjoint mean, written out in float64."""
    deltas = torch.stack([w * plain_trim((t.double() - base.double()), density) for t, w in zip(tuned, weights)])
    elected = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (deltas.sign() == elected).double()
    mass = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.dim())
    divisor = (agree * mass).sum(0)
    divisor[divisor == 0] = 1
    return (base.double() + scale * (deltas * agree).sum(0) / divisor).to(base.dtype)


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


@few
@given(st.integers(0, 999), shapes, st.sampled_from(DTYPES[:3]), st.lists(st.floats(0.01, 3), min_size=1, max_size=4))
def test_merging_equal_models_gives_the_model(seed, shape, dtype, weights):
    (model,) = tensors(seed, 1, shape, dtype)
    same = [model] * len(weights)
    ones = [torch.ones_like(model)] * len(weights)
    assert torch.equal(linear(same, weights), model)
    assert torch.equal(fisher(same, ones, weights), model)
    assert torch.equal(slerp(model, model, 0.3), model)
    for method in (ties, dare, magnitude_prune, task_arithmetic):
        assert torch.equal(method(model, same, weights), model)


@few
@given(st.integers(0, 999), shapes, st.sampled_from(DTYPES))
def test_weight_one_and_zero_gives_the_model_bit_for_bit(seed, shape, dtype):
    a, b = tensors(seed, 2, shape, dtype, step=1e4)
    a = torch.where(a.abs() < 0.1, torch.full_like(a, -0.0), a)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    for merged in (linear([a, b], [1, 0]), wise_ft(a, b, 0.0), task_arithmetic(a, [b], [0]), slerp(a, b, 0.0)):
        assert torch.equal(merged.view(bits), a.view(bits))
    assert torch.equal(linear([a, b], [0, 1]).view(bits), b.view(bits))
    assert torch.equal(wise_ft(a, b, 1.0).view(bits), b.view(bits))


@few
@given(st.integers(0, 999), shapes, st.sampled_from(DTYPES[:3]), st.floats(0.05, 1), st.permutations(range(3)))
def test_the_order_of_models_does_not_matter(seed, shape, dtype, density, order):
    base, *models = tensors(seed, 4, shape, dtype)
    shuffled = [models[i] for i in order]
    weights = [0.5, 1.0, 2.0]
    moved = [weights[i] for i in order]
    for method in (
        lambda m, w: linear(m, w),
        lambda m, w: task_arithmetic(base, m, w),
        lambda m, w: ties(base, m, w, density),
        lambda m, w: fisher(m, [x.abs() for x in m], w),
    ):
        assert ulps(method(models, weights), method(shuffled, moved)) <= 1


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_linear_task_arithmetic_and_negation(dtype):
    base, a, b = tensors(1, 3, (37, 11), dtype)
    x, y, z = base.double(), a.double(), b.double()
    assert ulps(linear([a, b], [3, 1]), ((3 * y + z) / 4).to(dtype)) <= 1
    assert ulps(linear([a, b], [3, 1], normalize=False), (3 * y + z).to(dtype)) <= 1
    assert ulps(task_arithmetic(base, [a, b], [0.4, 0.9]), (x + 0.4 * (y - x) + 0.9 * (z - x)).to(dtype)) <= 1
    assert ulps(negation(base, a, 0.5), (x - 0.5 * (y - x)).to(dtype)) <= 1
    assert ulps(wise_ft(base, a, 0.3), (0.7 * x + 0.3 * y).to(dtype)) <= 1


@few
@given(
    st.integers(0, 999),
    st.sampled_from(DTYPES[:3]),
    st.floats(0.05, 1),
    st.lists(st.floats(0.1, 2), min_size=1, max_size=3),
)
def test_ties_equals_the_plain_formula(seed, dtype, density, weights):
    base, *tuned = tensors(seed, len(weights) + 1, (9, 31), dtype, step=0.3)
    merged = ties(base, tuned, weights, density, scale=0.7)
    # Away from exact cancellation the elected sign is the same in any precision.
    assert ulps(merged, plain_ties(base, tuned, weights, density, 0.7)) <= 1


def test_ties_by_hand():
    base = torch.zeros(6)
    a = torch.tensor([4.0, -3.0, 2.0, 1.0, 0.0, 5.0])
    b = torch.tensor([-1.0, -5.0, 3.0, 2.0, 0.0, -9.0])
    # kept: a -> 4 -3 . . . 5, b -> . -5 3 . . -9; signs + - + . . -
    assert ties(base, [a, b], density=0.5).tolist() == [4.0, -4.0, 3.0, 0.0, 0.0, -9.0]
    assert ties(base, [a, b], density=0.5, scale=2).tolist() == [8.0, -8.0, 6.0, 0.0, 0.0, -18.0]


def test_model_scope_ranks_over_all_tensors_and_nobody_wins_an_even_vote():
    base = {"small": torch.zeros(4), "large": torch.zeros(4)}
    tuned = {"small": torch.tensor([1.0, -2.0, 3.0, 4.0]), "large": torch.tensor([10.0, -20.0, 30.0, 40.0])}
    merged = ties(base, [tuned], density=0.5, scope="model")
    assert merged["small"].tolist() == [0, 0, 0, 0]
    assert torch.equal(merged["large"], tuned["large"])
    per_tensor = ties(base, [tuned], density=0.5)
    assert per_tensor["small"].tolist() == [0, 0, 3, 4]
    a, b = torch.tensor([1.0, 5.0]), torch.tensor([-1.0, 5.0])
    assert ties(torch.zeros(2), [a, b], density=1.0, scope="model").tolist() == [0.0, 5.0]
    assert ties(torch.zeros(2), [a, b], density=1.0).tolist() == [1.0, 5.0]  # mergekit counts zero as plus


@pytest.mark.parametrize("density", [0.003, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_counting_selects_what_partitioning_selects(density, dtype, monkeypatch):
    base, a, b = tensors(3, 3, (300, 500), dtype, step=0.01)
    expected = ties(base, [a, b], density=density)
    monkeypatch.setattr(thresholds_module, "IN_MEMORY", 1000)
    monkeypatch.setattr(thresholds_module, "BLOCK", 1 << 14)
    assert torch.equal(ties(base, [a, b], density=density), expected)
    assert torch.equal(expected, plain_ties(base, [a, b], [1.0, 1.0], density)) or dtype == torch.float32


def test_a_misleading_sample_still_selects_exactly(monkeypatch):
    """The sampled places hold small numbers only; the counts send the search to the right interval."""
    size = thresholds_module.SPOTS * 4096
    delta = torch.linspace(1, 2, size)[torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    for spot in range(thresholds_module.SPOTS):
        delta[spot * 4096 : spot * 4096 + thresholds_module.SPOT] *= 1e-3
    monkeypatch.setattr(thresholds_module, "IN_MEMORY", 1000)
    merged = magnitude_prune(torch.zeros(size), [delta], density=0.1)
    assert torch.equal(merged, plain_trim(delta, 0.1))


def test_dare_keeps_a_share_rescales_and_depends_on_the_seed_only():
    base, tuned = torch.zeros(200_000), torch.ones(200_000)
    merged = dare(base, [tuned], density=0.25, seed=1)
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert abs((merged != 0).double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 200_000)
    assert torch.equal(merged, dare(base, [tuned], density=0.25, seed=1))
    assert not torch.equal(merged, dare(base, [tuned], density=0.25, seed=2))
    two = dare(base, [tuned, tuned], density=0.25, seed=1)
    assert set(two.unique().tolist()) == {0.0, 4.0, 8.0}  # each model has its own mask
    mean = dare(base, [tuned, tuned], density=0.25, seed=1, consensus="ties")
    assert set(mean.unique().tolist()) == {0.0, 4.0}


def test_slerp_keeps_the_norm_and_halves_the_angle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([math.sqrt(0.5)] * 2))
    a, b = (x / x.norm() for x in torch.randn(2, 400, 500, generator=torch.Generator().manual_seed(0)).unbind())
    middle = slerp(a, b, 0.25)
    assert middle.norm().item() == pytest.approx(1, abs=1e-5)
    whole, quarter = torch.acos((a * b).sum()), torch.acos((a * middle).sum())
    assert quarter.item() == pytest.approx(0.25 * whole.item(), abs=1e-4)


def test_fisher_is_the_weighted_mean_of_equation_15():
    a, b = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0])
    f, g = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3.0, 2.0, 0.0])
    assert fisher([a, b], [f, g]).tolist() == [2.5, 3.0, 2.0]
    assert fisher([a, b], [f, g], weights=[3, 1]).tolist() == [2.0, 3.0, 1.5]


def test_a_normalized_fisher_counts_by_where_it_lies_not_by_its_size():
    """Each Fᵢ over its Euclidean norm over all tensors: 10⁻⁶·F gives what F gives; zero Fishers stay a plain mean."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"a": (300, 700), "b": (5,), "none": (0,)}
    draw = lambda: {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}  # noqa: E731
    models, fishers, weights = [draw(), draw()], [draw(), draw()], [2.0, 0.5]
    fishers[0]["b"][0] = fishers[1]["b"][0] = 0
    norms = [math.sqrt(sum(float(part.square().sum()) for part in one.values())) for one in fishers]
    merged = fisher(models, fishers, weights, normalize=True)
    for name, found in merged.items():
        first, second = (w * f[name] / n for w, f, n in zip(weights, fishers, norms))
        expected = (first * models[0][name] + second * models[1][name]) / (first + second)
        if name == "b":
            expected[0] = (2 * models[0]["b"][0] + 0.5 * models[1]["b"][0]) / 2.5
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    small = {name: 1e-6 * part for name, part in fishers[1].items()}
    for name, found in fisher(models, [fishers[0], small], weights, normalize=True).items():
        torch.testing.assert_close(found, merged[name], rtol=1e-12, atol=0)
    zeros = {name: 0 * part for name, part in fishers[1].items()}
    assert torch.equal(fisher(models, [zeros, fishers[1]], normalize=True)["a"], models[1]["a"])


def test_bfloat16_rounds_to_nearest_even_from_both_working_types():
    raw = np.arange(0, 1 << 16, dtype=np.uint16)
    raw = raw[(raw & 0x7F80) != 0x7F80]
    values = decode(raw, "BF16", np.empty(raw.size, np.float64))
    halves = (values[:-1] + values[1:]) / 2
    for shift in (0, 1e-12, -1e-12):
        exact = halves * (1 + shift)
        expected = torch.from_numpy(halves if not shift else exact)
        below, above = raw[:-1].astype(np.int64), raw[1:].astype(np.int64)
        nearer = np.where(np.abs(exact) > np.abs(halves), np.maximum(below, above), np.minimum(below, above))
        even = np.where(below % 2 == 0, below, above)
        wanted = even if shift == 0 else nearer
        got = encode(expected.numpy().copy(), "BF16", np.empty(halves.size, np.uint16))
        inside = np.abs(below - above) == 1
        assert np.array_equal(got[inside], wanted[inside].astype(np.uint16))
    single = torch.randn(10_000).mul(3)
    got = encode(single.numpy().copy(), "BF16", np.empty(10_000, np.uint16))
    assert torch.equal(torch.from_numpy(got.view(np.int16)).view(torch.bfloat16), single.bfloat16())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (2.0, -1.0), (0.25, 1.0), (0.5, 0.0), (-1.0, 0.0)])
@pytest.mark.filterwarnings("error")
def test_two_terms_with_powers_of_two_round_once(weights):
    """The short cut for such weights gives, bit for bit, what float64 sums give that are then rounded to the input."""
    a, b = (one.numpy() for one in tensors(3, 2, (4096,), torch.float32, step=1e-5))
    b[:8] = [-a[0] / 2, a[1], -a[2], 3e38, -3e38, 1e-40, 0.0, -0.0]
    a[3:5] = 3e38  # twice this is infinite in float32, but 2a - b and (a + b)/2 are not
    with np.errstate(over="ignore"):
        exact = (weights[0] * a.astype(np.float64) + weights[1] * b.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(combine(weights, [a, b], Scratch()).view(np.int32), (exact + 0.0).view(np.int32))


@pytest.mark.parametrize("size", [3, 1 << 10, 1 << 17, 1 << 21])
def test_buffers_start_on_a_cache_line(size):
    scratch = Scratch()
    for name in "abcd":
        array = scratch.get(name, np.uint16, size)
        assert array.size == size and array.ctypes.data % LINE == 0


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_finite_sees_every_kind_of_nan_and_infinity(kind):
    values = np.array([0.0, -0.0, 1e-42, np.finfo(kind).max, np.finfo(kind).min], kind)
    assert finite(values) and finite(-values) and finite(values[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in range(5):
            broken = values.copy()
            broken[place] = bad
            assert not finite(broken), (bad, place)


def test_mappings_arrays_and_non_floating_tensors():
    base = {"w": torch.randn(3, 4), "ids": torch.arange(5)}
    tuned = {"w": base["w"] + 1, "ids": torch.arange(5)}
    merged = wise_ft(base, tuned, 0.5)
    assert torch.allclose(merged["w"], base["w"] + 0.5) and torch.equal(merged["ids"], base["ids"])
    array = linear([np.ones(3, np.float32), np.zeros(3, np.float32)])
    assert isinstance(array, np.ndarray) and array.tolist() == [0.5] * 3
    with pytest.raises(UserError, match="'ids' is not floating point and differs"):
        linear([base, {**tuned, "ids": torch.arange(5) + 1}])
    with pytest.raises(UserError, match="different shapes"):
        linear([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(UserError, match="same names; differing: extra"):
        linear([base, {**tuned, "extra": torch.zeros(1)}])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: linear([a, a], [1]), "2 models but 1 weights"),
        (lambda a: linear([a, a], [1, -1]), "sum to 0"),
        (lambda a: ties(a, [a], density=0), "density must be above 0"),
        (lambda a: ties(a, [a], scope="modl"), "Did you mean 'model'"),
        (lambda a: dare(a, [a], consensus="sum"), "consensus 'sum' is unknown"),
        (lambda a: slerp(a, a, t=1.5), "t must be between 0 and 1"),
        (lambda a: fisher([a, a], [a]), "one Fisher estimate per model"),
        (lambda a: fisher([a], [a], [-1]), "must not be negative"),
        (lambda a: linear([]), "at least one model"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.ones(4))
