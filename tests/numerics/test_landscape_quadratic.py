"""Scans of quadratic losses with a known Hessian against theory, and weights that come back bit for bit."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import UserError
from holdfast.landscape import FunctionLoss, curvature, evaluation_loss, noise_tensors, sharpness, surface


class Bowl(nn.Module):
    """L = b·w + ½ wᵀHw over a matrix, a tied copy of it, a vector and a frozen parameter; float64."""

    def __init__(self, eigenvalues: list[float] | None = None, slope: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        self.tied = self.matrix
        self.vector = nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        basis = torch.linalg.qr(torch.randn(26, 26, dtype=torch.float64))[0]
        values = torch.tensor(eigenvalues or [10.0, -4.0, 2.5] + [0.1] * 23, dtype=torch.float64)
        self.register_buffer("hessian", basis @ torch.diag(values) @ basis.T)
        self.register_buffer("slope", slope * torch.randn(26, dtype=torch.float64))

    def flat(self) -> Tensor:
        return torch.cat([self.matrix.flatten(), self.vector])

    def forward(self) -> Tensor:
        w = self.flat()
        return self.slope @ w + 0.5 * w @ self.hessian @ w


def loss(model: nn.Module) -> Tensor:
    return model()


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def flat_directions(model: Bowl, kind: str, seed: int) -> list[Tensor]:
    found = [noise_tensors(model, seed=seed, number=i, kind=kind) for i in (0, 1)]  # type: ignore[arg-type]
    return [torch.cat([d["matrix"].flatten(), d["vector"]]) for d in found]


@pytest.mark.parametrize("kind", ["gaussian", "filter"])
def test_grid_and_metrics_match_theory(kind: str) -> None:
    model = Bowl(slope=1.0)
    found = surface(model, loss, grid=7, range=0.5, directions=kind, seed=5)
    d1, d2 = flat_directions(model, kind, 5)
    w, h, b = model.flat().detach(), model.hessian, model.slope
    exact = np.array(
        [[float(b @ p + 0.5 * p @ h @ p) for y in found.betas for p in [w + x * d1 + y * d2]] for x in found.alphas]
    )
    np.testing.assert_allclose(found.grid, exact, rtol=1e-9, atol=1e-9)
    a11, a22, a12 = (float(x) for x in (d1 @ h @ d1, d2 @ h @ d2, d1 @ h @ d2))
    g = b + h @ w
    x, y = np.meshgrid(found.alphas, found.betas, indexing="ij")
    slopes = np.hypot(float(g @ d1) + a11 * x + a12 * y, float(g @ d2) + a12 * x + a22 * y)
    steps = np.concatenate([np.abs(np.diff(exact, axis=0)).ravel(), np.abs(np.diff(exact, axis=1)).ravel()])
    metrics = found.flatness()
    assert metrics.sc == pytest.approx(abs(a11 + a22), rel=1e-6)
    assert metrics.ag == pytest.approx(slopes.mean(), rel=1e-6)
    assert metrics.mag == pytest.approx(steps.mean(), rel=1e-6)
    assert found.meta["norms"] == pytest.approx([float(d1.norm()), float(d2.norm())], rel=1e-9)
    assert found.meta["cosine"] == pytest.approx(float(d1 @ d2 / d1.norm() / d2.norm()), rel=1e-9)


def test_the_centre_is_the_evaluation_loss_exactly() -> None:
    model = Bowl(slope=1.0)
    found = surface(model, loss, grid=5)
    assert found.centre == found.grid[2, 2] == evaluation_loss(model, loss) == float(model().detach())


def test_regenerated_directions_give_the_same_bits_as_stored_ones() -> None:
    model = Bowl(slope=1.0)
    for kind in ("gaussian", "filter"):
        stored, drawn = (surface(model, loss, grid=5, directions=kind, memory=m) for m in ("stored", "regenerated"))
        np.testing.assert_array_equal(stored.grid, drawn.grid)
        assert (stored.meta["plan"]["copies"], drawn.meta["plan"]["copies"]) == (3, 1)


def test_filter_noise_has_the_norm_of_each_row_and_of_each_vector() -> None:
    model = Bowl()
    with torch.no_grad():
        model.matrix[3] = 0.0
    noise = noise_tensors(model, seed=1, kind="filter")
    torch.testing.assert_close(noise["matrix"].norm(dim=1), model.matrix.detach().norm(dim=1))
    torch.testing.assert_close(noise["vector"].norm(), model.vector.detach().norm())
    assert not noise["matrix"][3].any()
    assert set(noise) == {"matrix", "vector"}  # tied once, frozen not at all


def test_gaussian_noise_is_standard_normal_and_depends_on_seed_number_and_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(300, 400)) for _ in range(2))

    drawn = noise_tensors(Two(), seed=1)
    assert abs(float(drawn["a"].mean())) < 0.01 and abs(float(drawn["a"].std()) - 1) < 0.01
    others = [drawn["b"], noise_tensors(Two(), seed=2)["a"], noise_tensors(Two(), seed=1, number=1)["a"]]
    for other in others:
        assert abs(float((drawn["a"] * other).mean())) < 0.02
    # blocks of one tensor differ, and the same request gives the same noise
    assert abs(float((drawn["a"][:80] * drawn["a"][80:160]).mean())) < 0.02
    assert torch.equal(noise_tensors(Two(), seed=1)["a"], drawn["a"])


def test_trace_and_eigenvalues_of_a_known_hessian() -> None:
    pytest.importorskip("hessian_eigenthings")
    for product, tolerance in (("autograd", 1e-6), ("finite_difference", 1e-6)):
        model = Bowl(slope=1.0)
        before = bits(model)
        found = curvature(model, loss, eigenvalues=3, iterations=26, probes=4, product=product)  # type: ignore[arg-type]
        assert found.eigenvalues == pytest.approx([10.0, -4.0, 2.5], rel=tolerance)
        assert found.converged == (True, True, True)
        assert bits(model) == before
    # Rademacher probes are exact for a diagonal Hessian: one is enough
    model = Bowl()
    model.hessian = torch.diag(torch.arange(26.0, dtype=torch.float64) - 3)
    assert curvature(model, loss, probes=1, eigenvalues=1).trace == pytest.approx(325 - 78, rel=1e-6)


def test_the_trace_estimate_agrees_with_the_trace_within_its_error() -> None:
    pytest.importorskip("hessian_eigenthings")
    model = Bowl()
    found = curvature(model, loss, probes=200, eigenvalues=1)
    assert 0 < found.trace_error < 2
    assert abs(found.trace - float(model.hessian.trace())) < 4 * found.trace_error


def test_worst_and_average_rise_match_theory() -> None:
    model = Bowl(slope=1.0)
    before = bits(model)
    w, h = model.flat().detach(), model.hessian
    g = model.slope + h @ w
    e = 0.3 * g / g.norm()
    found = sharpness(model, loss, rho=0.3, directions=3, seed=4)
    assert found.worst == pytest.approx(float(g @ e + 0.5 * e @ h @ e), rel=1e-6)
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-9)
    for number, value in enumerate(found.average.values):
        noise = noise_tensors(model, seed=4, number=number)
        u = torch.cat([noise["matrix"].flatten(), noise["vector"]])
        u = 0.3 * u / u.norm()
        assert value == pytest.approx(float(0.5 * u @ h @ u), rel=1e-6)
    assert found.relative_rho == pytest.approx(0.3 / float(w.norm()))
    assert bits(model) == before


def test_more_ascent_steps_find_the_top_of_the_sphere() -> None:
    model = Bowl([5.0] + [0.5] * 25)
    with torch.no_grad():  # near the minimum, where one step points the wrong way
        for parameter in (model.matrix, model.vector):
            parameter.mul_(1e-6)
    one, many = (sharpness(model, loss, rho=0.2, steps=s, directions=1).worst for s in (1, 30))
    assert many == pytest.approx(0.5 * 5.0 * 0.2**2, rel=1e-3)
    assert one <= many


def test_average_rise_is_the_trace_over_the_count() -> None:
    model = Bowl([2.0] * 26)
    found = sharpness(model, loss, rho=0.1, directions=2)
    assert found.average.mean == pytest.approx(0.1**2 / 2 * 2.0, rel=1e-6)  # rho²/(2n)·trace, isotropic


class Boom(Exception):
    pass


def scans(model: nn.Module, function: Callable[[nn.Module], Any]) -> dict[str, Callable[[], Any]]:
    return {
        "surface": lambda: surface(model, function, grid=5),
        "regenerated": lambda: surface(model, function, grid=5, memory="regenerated"),
        "sharpness": lambda: sharpness(model, function, steps=3),
    }


@pytest.mark.parametrize("what", ["surface", "regenerated", "sharpness"])
@pytest.mark.parametrize("how", ["finish", "exception", "ctrl-c"])
def test_weights_modes_and_gradients_come_back(what: str, how: str) -> None:
    model = Bowl(slope=1.0)
    model.train()
    model.matrix.grad = torch.ones_like(model.matrix)
    before, rng = bits(model), torch.get_rng_state()
    calls = 0

    def function(m: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        assert not m.training
        if calls == 4 and how == "exception":
            raise Boom
        if calls == 4 and how == "ctrl-c":
            assert bits(model) != before
            signal.raise_signal(signal.SIGINT)
        return m()

    if how == "finish":
        scans(model, function)[what]()
    else:
        with pytest.raises(Boom if how == "exception" else KeyboardInterrupt):
            scans(model, function)[what]()
    assert bits(model) == before
    assert model.training and model.frozen.requires_grad is False and model.matrix.requires_grad
    assert torch.equal(model.matrix.grad, torch.ones_like(model.matrix))
    assert torch.equal(torch.get_rng_state(), rng)


def test_ctrl_c_while_threads_write_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that writes a block after the weights were put back would leave them changed."""
    from holdfast.landscape import weights

    model = nn.Linear(64, 64 * 40, bias=False)  # five blocks, so that threads have work
    before, real = bits(model), weights._add
    started = threading.Event()

    def slow(*args: Any) -> None:
        if not started.is_set():
            started.set()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.02)
        real(*args)

    monkeypatch.setattr(weights, "_add", slow)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            surface(model, lambda m: m.weight.sum(), grid=3)
    finally:
        torch.set_num_threads(threads)
    threading.Event().wait(0.2)
    assert bits(model) == before


def test_ctrl_c_while_the_weights_are_put_back_waits_until_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.landscape import weights

    model, calls = Bowl(slope=1.0), 0
    before, restore = bits(model), weights.Mover.restore

    def function(m: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            assert bits(model) != before
            monkeypatch.setattr(weights.Mover, "restore", pressed)
            raise Boom
        return m()

    def pressed(self: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        restore(self)

    with pytest.raises(KeyboardInterrupt):
        surface(model, function, grid=3)
    assert bits(model) == before


def test_an_interrupted_scan_continues_with_the_same_result(tmp_path: Any) -> None:
    model, calls = Bowl(slope=1.0), 0

    def function(m: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return m()

    whole = surface(model, loss, grid=5)
    named = FunctionLoss(function, name="bowl")
    with pytest.raises(KeyboardInterrupt):
        surface(model, named, grid=5, cache=tmp_path)
    log = next(tmp_path.glob("*/points-0.jsonl"))
    log.write_text(log.read_text() + '{"point":24,"lo')  # cut off by a crash
    resumed = surface(model, named, grid=5, cache=tmp_path)
    assert calls == 26  # 10 finished, 1 interrupted, 15 left
    np.testing.assert_array_equal(resumed.grid, whole.grid)
    surface(model, named, grid=5, cache=tmp_path)
    assert calls == 26
    surface(model, named, grid=5, cache=tmp_path, seed=1)
    with torch.no_grad():
        model.frozen.add_(1.0)  # also decides the loss of a real model
    surface(model, named, grid=5, cache=tmp_path)
    assert calls == 26 + 2 * 25
    with pytest.raises(UserError, match="name="):
        surface(model, loss, grid=5, cache=tmp_path)


def test_regions_without_a_finite_loss_are_kept_as_such() -> None:
    model = Bowl()
    found = surface(model, lambda m: torch.log(8.0 - m.flat()[0].abs() * 4), grid=9, range=2.0)
    assert 0 < found.flatness().excluded < 81
    assert math.isfinite(found.flatness().sc)
    assert "not finite" in found.notes()[0]


def test_a_range_below_rounding_is_said() -> None:
    model = nn.Linear(8, 8).requires_grad_(True)
    found = surface(model, lambda m: 3.0 + (m.weight**2).sum(), grid=7, range=1e-9)
    assert "range is too small" in " ".join(found.notes())
    assert surface(model, lambda m: 3.0 + (m.weight**2).sum(), grid=7, range=0.5).notes() == []


def test_mistakes_are_named() -> None:
    model = Bowl()
    for settings, words in [
        ({"grid": 4}, "odd"),
        ({"grid": 1}, "at least 3"),
        ({"directions": "gausian"}, "gaussian"),
        ({"memory": "some"}, "stored"),
        ({"range": -1.0}, "positive"),
        ({"split": "half"}, "split"),
    ]:
        with pytest.raises(UserError, match=words):
            surface(model, loss, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="scope='all'"):
        surface(model.requires_grad_(False), loss)
