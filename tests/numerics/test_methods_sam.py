"""The SAM family against plain formulas on flat float64 vectors: a quadratic and a two-layer network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from holdfast import SAM
from holdfast.errors import UserError
from holdfast.method import Context
from holdfast.methods import MomentumSAM
from holdfast.methods.perturbation import noise_like, round_stochastically


@dataclass
class Problem:
    """Parameters in several tensors, a ``grad`` for methods, and the same gradient as a function of a flat vector."""

    params: dict[str, nn.Parameter]
    loss_at: Callable[[Tensor], Tensor]

    def flat(self) -> Tensor:
        return torch.cat([param.detach().reshape(-1) for param in self.params.values()])

    def flat_grad(self) -> Tensor:
        return torch.cat([param.grad.reshape(-1) for param in self.params.values()])

    def gradient_at(self, theta: Tensor) -> Tensor:
        return torch.func.grad(self.loss_at)(theta)

    def grad(self) -> Tensor:
        for param in self.params.values():
            param.grad = None
        loss = self.loss_at(torch.cat([param.reshape(-1) for param in self.params.values()]))
        loss.backward()
        return loss.detach()


def quadratic() -> Problem:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    target = torch.randn(9, generator=generator, dtype=torch.float64)
    start = torch.randn(9, generator=generator, dtype=torch.float64)
    params = {"a.weight": nn.Parameter(start[:6].reshape(2, 3).clone()), "a.bias": nn.Parameter(start[6:].clone())}
    return Problem(params, lambda theta: 0.5 * (root @ (theta - target)).square().sum())


def network() -> Problem:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (7,), generator=generator)
    shapes = {"in.weight": (4, 3), "in.bias": (4,), "out.weight": (2, 4)}
    params = {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in shapes.items()
    }

    def loss_at(theta: Tensor) -> Tensor:
        w1, b1, w2 = theta[:12].reshape(4, 3), theta[12:16], theta[16:].reshape(2, 4)
        return nn.functional.cross_entropy(torch.tanh(inputs @ w1.T + b1) @ w2.T, labels)

    return Problem(params, loss_at)


def names_flat(problem: Problem) -> list[str]:
    return [name for name, param in problem.params.items() for _ in range(param.numel())]


problems = pytest.mark.parametrize("make", [quadratic, network])


def check(problem: Problem, method: SAM, epsilon: Tensor) -> None:
    before = problem.flat()
    expected = problem.gradient_at(before + epsilon)
    method.gradient(problem.grad, problem.params)()
    assert torch.equal(problem.flat(), before), "the weights must come back bit for bit"
    torch.testing.assert_close(problem.flat_grad(), expected, rtol=0, atol=1e-10)
    assert (expected - problem.gradient_at(before)).abs().max() > 1e-4


@problems
def test_sam(make: Callable[[], Problem]) -> None:
    problem = make()
    g = problem.gradient_at(problem.flat())
    check(problem, SAM(rho=0.3), 0.3 * g / g.norm())


@problems
def test_asam_of_the_paper(make: Callable[[], Problem]) -> None:
    """T = |w| + η for weights, 1 for biases; ε = ρ T² g / ‖T g‖."""
    problem = make()
    theta = problem.flat()
    g = problem.gradient_at(theta)
    is_weight = torch.tensor([name.endswith("weight") for name in names_flat(problem)])
    t = torch.where(is_weight, theta.abs() + 0.02, torch.ones_like(theta))
    check(problem, SAM(rho=0.4, adaptive="asam", eta=0.02), 0.4 * t * t * g / (t * g).norm())
    problem = make()
    t = torch.where(is_weight, theta.abs() + 0.01, torch.ones_like(theta))
    check(problem, SAM(rho=0.4, adaptive=True), 0.4 * t * t * g / (t * g).norm())


@problems
def test_asam_by_magnitude(make: Callable[[], Problem]) -> None:
    """ε = ρ θ² g / ‖ |θ| g ‖ for every parameter."""
    problem = make()
    theta = problem.flat()
    g = problem.gradient_at(theta)
    check(problem, SAM(rho=0.4, adaptive="magnitude"), 0.4 * theta**2 * g / (theta.abs() * g).norm())


@problems
def test_scope_perturbs_only_what_it_names_with_norm_rho(make: Callable[[], Problem]) -> None:
    problem = make()
    g = problem.gradient_at(problem.flat())
    inside = torch.tensor([name.endswith("bias") for name in names_flat(problem)])
    masked = torch.where(inside, g, torch.zeros_like(g))
    check(problem, SAM(rho=0.3, scope="bias$"), 0.3 * masked / masked.norm())
    with pytest.raises(UserError, match="matches none"):
        SAM(scope="nothing").gradient(problem.grad, problem.params)


@problems
def test_fisher_mask_keeps_the_largest_squares_and_does_not_rescale(make: Callable[[], Problem]) -> None:
    problem = make()
    g = problem.gradient_at(problem.flat())
    keep = round(0.6 * g.numel())
    mask = torch.zeros_like(g)
    mask[g.square().topk(keep).indices] = 1
    check(problem, SAM(rho=0.3, mask=1 - keep / g.numel()), 0.3 * g * mask / g.norm())


@problems
def test_random_direction_has_norm_rho(make: Callable[[], Problem]) -> None:
    problem = make()
    method = SAM(rho=0.3, direction="random")
    method.begin(Context(problem.params, seed=5))
    noise = torch.cat([part.reshape(-1) for part in noise_like(list(problem.params.values()), 5 * 1_000_003)]).double()
    check(problem, method, 0.3 * noise / noise.norm())


@problems
def test_every_second_step_is_plain(make: Callable[[], Problem]) -> None:
    problem = make()
    g = problem.gradient_at(problem.flat())
    sharp = problem.gradient_at(problem.flat() + 0.3 * g / g.norm())
    step = SAM(rho=0.3, every=2).gradient(problem.grad, problem.params)
    for expected in (sharp, g, sharp):
        step()
        torch.testing.assert_close(problem.flat_grad(), expected, rtol=0, atol=1e-10)


@problems
def test_looksam_reuses_the_orthogonal_part(make: Callable[[], Problem]) -> None:
    """Between sharp steps: g + α ‖g‖/‖g_v‖ g_v, with g_v from the last sharp step."""
    problem = make()
    theta = problem.flat()
    g0 = problem.gradient_at(theta)
    sharp = problem.gradient_at(theta + 0.3 * g0 / g0.norm())
    cosine = (sharp @ g0) / (sharp.norm() * g0.norm())
    orthogonal = sharp - sharp.norm() * cosine * g0 / g0.norm()
    step = SAM(rho=0.3, every=3, reuse=0.7).gradient(problem.grad, problem.params)
    step()
    torch.testing.assert_close(problem.flat_grad(), sharp, rtol=0, atol=1e-10)
    with torch.no_grad():
        for param in problem.params.values():
            param.add_(0.1)
    g1 = problem.gradient_at(theta + 0.1)
    step()
    expected = g1 + 0.7 * g1.norm() / orthogonal.norm() * orthogonal
    torch.testing.assert_close(problem.flat_grad(), expected, rtol=0, atol=1e-10)


def test_micro_groups_perturb_each_micro_batch_on_its_own() -> None:
    one, two = quadratic(), network()
    theta = nn.Parameter(torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    parts = [lambda t: one.loss_at(t[:9]), lambda t: two.loss_at(t)]

    class Window:
        def __call__(self) -> Tensor:
            raise AssertionError("micro groups never need the whole window")

        def parts(self) -> list[Callable[[], Tensor]]:
            return [lambda part=part: self.run(part) for part in parts]

        def run(self, part: Callable[[Tensor], Tensor]) -> Tensor:
            theta.grad = None
            loss = part(theta)
            loss.backward()
            return loss.detach()

    expected = torch.zeros_like(theta)
    for part in parts:
        g = torch.func.grad(part)(theta.detach())
        expected = expected + torch.func.grad(part)(theta.detach() + 0.3 * g / g.norm())
    loss = SAM(rho=0.3, group="micro").gradient(Window(), {"theta": theta})()
    torch.testing.assert_close(theta.grad, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, parts[0](theta.detach()) + parts[1](theta.detach()))
    with pytest.raises(UserError, match="first method"):
        SAM(group="micro").gradient(one.grad, one.params)


@problems
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_momentum_sam_steps_against_the_momentum(make: Callable[[], Problem], kind: str) -> None:
    problem = make()
    params = list(problem.params.values())
    optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9) if kind == "sgd" else torch.optim.Adam(params, lr=0.05)
    method = MomentumSAM(rho=0.3)
    method.begin(Context(problem.params, optimizer=optimizer))
    step = method.gradient(problem.grad, problem.params)
    theta, m = problem.flat(), torch.zeros(len(names_flat(problem)), dtype=torch.float64)
    for _ in range(3):
        moved = theta - 0.3 * m / m.norm() if m.norm() > 0 else theta
        expected = problem.gradient_at(moved)
        step()
        torch.testing.assert_close(problem.flat_grad(), expected, rtol=0, atol=1e-10)
        m = 0.9 * m + (expected if kind == "sgd" else 0.1 * expected)
        optimizer.step()
        theta = problem.flat()
    with pytest.raises(UserError, match="momentum"):
        MomentumSAM().begin(Context(problem.params, optimizer=torch.optim.SGD(params, lr=0.1)))


def test_weights_come_back_bit_for_bit_when_the_second_pass_raises() -> None:
    problem = network()
    before, calls = problem.flat(), []

    def grad() -> Tensor:
        calls.append(problem.flat())
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return problem.grad()

    with pytest.raises(RuntimeError, match="out of memory"):
        SAM(rho=0.5).gradient(grad, problem.params)()
    assert not torch.equal(calls[1], before)
    assert torch.equal(problem.flat(), before)


def test_second_pass_not_finite_skips_the_step_and_counts_it_and_warns_once() -> None:
    problem = quadratic()
    before, calls = problem.flat(), [0]
    logged: dict[str, list[float]] = {}

    def grad() -> Tensor:
        calls[0] += 1
        loss = problem.grad()
        return loss * float("nan") if calls[0] % 2 == 0 else loss

    method = SAM(rho=0.5)
    method.begin(Context(problem.params, log=lambda name, value: logged.setdefault(name, []).append(value)))
    step = method.gradient(grad, problem.params)
    with pytest.warns(UserWarning, match="skipped") as caught:
        loss = step(), step()
    assert len(caught) == 1 and method.skipped == 2 and logged["skipped"] == [1.0, 1.0]
    assert all(torch.isfinite(value) for value in loss)
    assert torch.equal(problem.flat(), before)
    assert all(param.grad is None for param in problem.params.values())


def test_one_micro_batch_not_finite_skips_the_whole_window_and_counts_it_once() -> None:
    problem = quadratic()
    before, calls = problem.flat(), [0]
    logged: dict[str, list[float]] = {}

    class Parts:
        """Three micro-batches; the second pass of the first one is not finite."""

        def __call__(self) -> Tensor:
            raise AssertionError("micro-batches one by one")

        def parts(self) -> list[Callable[[], Tensor]]:
            return [self._part] * 3

        def _part(self) -> Tensor:
            calls[0] += 1
            return problem.grad() * (float("nan") if calls[0] == 2 else 1.0)

    method = SAM(rho=0.5, group="micro")
    method.begin(Context(problem.params, log=lambda name, value: logged.setdefault(name, []).append(value)))
    with pytest.warns(UserWarning, match="skipped"):
        method.gradient(Parts(), problem.params)()
    assert method.skipped == 1 and logged["skipped"] == [1.0]
    assert torch.equal(problem.flat(), before)
    assert all(param.grad is None for param in problem.params.values())


def test_bf16_weights_are_refused_and_stochastic_rounding_is_unbiased() -> None:
    param = nn.Parameter(torch.full((20_000,), 1.0, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="bfloat16"):
        SAM(rho=0.05).gradient(lambda: None, {"w": param})
    values = torch.tensor([1.0 + 0.3 * 2**-7, -2.0 - 0.9 * 2**-6, 1e-3, 0.0, -1.0])
    drawn = torch.stack([round_stochastically(values, seed).float() for seed in range(4000)])
    spacing = torch.tensor([2**-7, 2**-6, 2**-17, 1.0, 1.0])
    error = (drawn.mean(0) - values).abs() / spacing
    assert error.max() < 4 * 0.5 / 4000**0.5, error  # 4 standard errors of a coin at most
    assert torch.equal(drawn[:, 3:], values[3:].expand(4000, 2))


def test_perturbation_of_bf16_weights_is_right_on_average() -> None:
    """ρ is far below the spacing of bf16 numbers: nearest rounding would leave nothing of ε."""
    count, rho = 40_000, 0.05
    param = nn.Parameter(torch.full((count,), 1.0, dtype=torch.bfloat16))
    seen: list[Tensor] = []
    logged: dict[str, float] = {}

    def grad() -> Tensor:
        seen.append(param.detach().float().clone())
        param.grad = torch.ones_like(param)
        return torch.zeros(())

    method = SAM(rho=rho, stochastic_rounding=True)
    method.begin(Context({"w": param}, seed=1, log=logged.__setitem__))
    method.gradient(grad, {"w": param})()
    step = rho / count**0.5
    moved = seen[1] - seen[0]
    standard_error = (step * 2**-7) ** 0.5 / count**0.5
    assert float((seen[0] + step).to(torch.bfloat16).float().sub(1).abs().max()) == 0.0
    assert abs(float(moved.mean()) - step) < 4 * standard_error
    assert logged["realised_rho"] == pytest.approx(float(moved.norm()), rel=1e-4)
    assert logged["realised_cosine"] == pytest.approx(float(moved.mean() / moved.square().mean().sqrt()), rel=1e-3)


def test_metrics_of_a_perturbation() -> None:
    problem = quadratic()
    logged: dict[str, float] = {}
    method = SAM(rho=0.3)
    method.begin(Context(problem.params, log=logged.__setitem__))
    theta = problem.flat()
    g = problem.gradient_at(theta)
    method.gradient(problem.grad, problem.params)()
    gap = problem.loss_at(theta + 0.3 * g / g.norm()) - problem.loss_at(theta)
    assert logged["sharpness"] == pytest.approx(float(gap), rel=1e-6)
    assert logged["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-6)
    assert logged["realised_rho"] == pytest.approx(0.3, rel=1e-4)
    assert logged["realised_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert logged["relative_rho"] == pytest.approx(0.3 / float(theta.norm()), rel=1e-6)
