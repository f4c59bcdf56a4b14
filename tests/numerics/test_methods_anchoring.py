"""Anchoring and averaging methods against plain float64 formulas, on a quadratic and a two-layer network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast import EMA, EWC, L2, SFA, Distill, FisherMerge, Freeze, WiSEFT
from holdfast.errors import UserError
from holdfast.method import Batch, Context, Method
from holdfast.methods import L1
from holdfast.methods.fisher import diagonal
from holdfast.methods.mixing import take

INPUTS = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.randint(0, 2, (7,), generator=torch.Generator().manual_seed(2))
ROOT = torch.randn(20, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 4


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * (ROOT @ (theta - 0.3)).square().sum()


def network(theta: Tensor) -> Tensor:
    w1, w2 = theta[:12].reshape(4, 3), theta[12:].reshape(2, 4)
    return nn.functional.cross_entropy(torch.tanh(INPUTS @ w1.T) @ w2.T, LABELS)


both = pytest.mark.parametrize("loss_at", [quadratic, network])
in_stretches = pytest.mark.usefixtures("stretch")


@pytest.fixture(params=[None, 5], ids=["whole tensors", "stretches of 5"])
def stretch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalties also work on a tensor stretch by stretch."""
    if request.param is not None:
        monkeypatch.setattr("holdfast.tensors.PIECE", request.param)


class World:
    """20 weights in two tensors, a ``grad`` for methods, and SGD with momentum."""

    def __init__(self, loss_at: Callable[[Tensor], Tensor], momentum: float = 0.0, lr: float = 0.1) -> None:
        start = torch.randn(20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        self.params = {
            "embed.weight": nn.Parameter(start[:12].reshape(4, 3).clone()),
            "layers.0.w": nn.Parameter(start[12:].reshape(2, 4).clone()),
        }
        self.loss_at = loss_at
        self.optimizer = torch.optim.SGD(self.params.values(), lr=lr, momentum=momentum)

    def flat(self) -> Tensor:
        return torch.cat([param.detach().reshape(-1) for param in self.params.values()])

    def grad(self) -> Tensor:
        for param in self.params.values():
            param.grad = None
        loss = self.loss_at(torch.cat([param.reshape(-1) for param in self.params.values()]))
        loss.backward()
        return loss.detach()

    def run(self, method: Method, steps: int, probe: Any = None) -> list[Tensor]:
        method.begin(Context(self.params, optimizer=self.optimizer, total=steps, probe=probe))
        step_gradient = method.gradient(self.grad, self.params)
        path = []
        for step in range(1, steps + 1):
            step_gradient()
            self.optimizer.step()
            method.weights(self.params, step, steps)
            path.append(self.flat())
        return path


def slope(loss_at: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    return torch.func.grad(loss_at)(theta)


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def penalised(loss_at: Callable[[Tensor], Tensor], term: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    theta = World(loss_at).flat()
    anchor, path = theta.clone(), []
    for _ in range(steps):
        theta = theta - 0.1 * (slope(loss_at, theta) + term(theta - anchor))
        path.append(theta)
    return path


@in_stretches
@both
def test_l2(loss_at: Callable[[Tensor], Tensor]) -> None:
    close(World(loss_at).run(L2(weight=0.7), 5), penalised(loss_at, lambda d: 0.7 * d, 5))


@in_stretches
@both
def test_l1(loss_at: Callable[[Tensor], Tensor]) -> None:
    close(World(loss_at).run(L1(weight=0.02), 5), penalised(loss_at, lambda d: 0.02 * d.sign(), 5))


@both
def test_freeze_leaves_weight_decay_out_too(loss_at: Callable[[Tensor], Tensor]) -> None:
    world = World(loss_at)
    world.optimizer = torch.optim.AdamW(world.params.values(), lr=0.1, weight_decay=0.5)
    before = world.flat()
    after = world.run(Freeze(embeddings=True), 3)[-1]
    assert torch.equal(after[:12], before[:12]) and (after[12:] != before[12:]).all()
    assert Freeze(layers=1, pattern="^embed").frozen(world.params) == ["embed.weight", "layers.0.w"]
    with pytest.raises(UserError, match="names none"):
        Freeze(pattern="nothing").gradient(world.grad, world.params)


def algorithm_1(loss_at: Callable[[Tensor], Tensor], p: float, beta: float, total: int) -> list[Tensor]:
    """arXiv 2501.05559, Algorithm 1, line by line."""
    theta = World(loss_at).flat()
    anchor, path = theta.clone(), []
    for t in range(1, total + 1):
        theta = theta - 0.1 * slope(loss_at, theta)
        if t % round(p * total) == 0:
            theta = beta * anchor + (1 - beta) * theta
        if t == total and total % round(p * total) != 0:
            theta = beta * anchor + (1 - beta) * theta
        path.append(theta)
    return path


@both
@pytest.mark.parametrize(("p", "total"), [(0.25, 8), (0.3, 10), (0.4, 9), (1.0, 5)])
def test_sfa_follows_algorithm_1(loss_at: Callable[[Tensor], Tensor], p: float, total: int) -> None:
    close(World(loss_at).run(SFA(p=p, beta=0.3), total), algorithm_1(loss_at, p, 0.3, total))


@both
def test_sfa_at_every_step_is_l2_with_another_learning_rate(loss_at: Callable[[Tensor], Tensor]) -> None:
    """Section 6: β = ηλ and α = η/(1 − ηλ)."""
    eta, weight, steps = 0.1, 2.0, 6
    averaged = World(loss_at, lr=eta / (1 - eta * weight)).run(SFA(p=1 / steps, beta=eta * weight), steps)
    close(averaged, World(loss_at, lr=eta).run(L2(weight=weight), steps))


@both
def test_sfa_rolling_is_lookahead(loss_at: Callable[[Tensor], Tensor]) -> None:
    theta = World(loss_at).flat()
    slow, path = theta.clone(), []
    for t in range(1, 7):
        theta = theta - 0.1 * slope(loss_at, theta)
        if t % 2 == 0:
            slow = theta = slow + 0.6 * (theta - slow)
        path.append(theta)
    close(World(loss_at).run(SFA(p=1 / 3, beta=0.4, anchor="rolling"), 6), path)


@both
def test_sfa_continuous_pulls_as_much_per_interval(loss_at: Callable[[Tensor], Tensor]) -> None:
    theta = World(loss_at).flat()
    anchor, path = theta.clone(), []
    gamma = 1 - (1 - 0.4) ** (1 / 3)
    for _ in range(6):
        theta = theta - 0.1 * slope(loss_at, theta)
        theta = (1 - gamma) * theta + gamma * anchor
        path.append(theta)
    close(World(loss_at).run(SFA(p=0.5, beta=0.4, mode="continuous"), 6), path)
    assert (1 - gamma) ** 3 == pytest.approx(1 - 0.4)


@both
@pytest.mark.parametrize("moments", ["keep", "scale", "reset"])
def test_sfa_moments_of_momentum(loss_at: Callable[[Tensor], Tensor], moments: Any) -> None:
    theta = World(loss_at).flat()
    anchor, velocity, path = theta.clone(), torch.zeros_like(theta), []
    for t in range(1, 7):
        velocity = 0.9 * velocity + slope(loss_at, theta)
        theta = theta - 0.1 * velocity
        if t % 2 == 0:
            theta = 0.5 * anchor + 0.5 * theta
            velocity = velocity * {"keep": 1.0, "scale": 0.5, "reset": 0.0}[moments]
        path.append(theta)
    close(World(loss_at, momentum=0.9).run(SFA(p=1 / 3, moments=moments), 6), path)


def test_sfa_moments_of_adam() -> None:
    """scale keeps the second moment, reset forgets both and the step count."""
    for moments in ("scale", "reset"):
        world = World(network)
        world.optimizer = torch.optim.Adam(world.params.values(), lr=0.1)
        world.run(SFA(p=1.0, moments=moments), 3)
        other = World(network)
        other.optimizer = torch.optim.Adam(other.params.values(), lr=0.1)
        other.run(SFA(p=1.0, moments="keep"), 3)
        for mine, plain in zip(world.params.values(), other.params.values(), strict=True):
            state, kept = world.optimizer.state[mine], other.optimizer.state[plain]
            scale = (0.5, 1.0, 1.0) if moments == "scale" else (0.0, 0.0, 0.0)
            torch.testing.assert_close(state["exp_avg"], scale[0] * kept["exp_avg"])
            torch.testing.assert_close(state["exp_avg_sq"], scale[1] * kept["exp_avg_sq"])
            assert float(state["step"]) == 3 * scale[2]


@both
def test_ema(loss_at: Callable[[Tensor], Tensor]) -> None:
    theta = World(loss_at).flat()
    average, path = theta.clone(), []
    for _ in range(5):
        theta = theta - 0.1 * slope(loss_at, theta)
        average = 0.8 * average + 0.2 * theta
        path.append(theta)
    close(World(loss_at).run(EMA(decay=0.8), 5), [*path[:-1], average])


def test_wiseft_and_what_it_leaves_alone() -> None:
    tuned = {"w": torch.tensor([1.0, 3.0]), "half": torch.tensor([2.0]).bfloat16(), "ids": torch.tensor([5])}
    anchor = {"w": torch.tensor([3.0, 5.0]), "half": torch.tensor([4.0]).bfloat16(), "ids": torch.tensor([1])}
    merged = WiSEFT(alpha=0.75).checkpoint(tuned, anchor)
    assert merged["w"].tolist() == [1.5, 3.5] and merged["half"].tolist() == [2.5] and merged["ids"].tolist() == [5]
    assert merged["half"].dtype == torch.bfloat16 and len(merged) == 3


def test_wiseft_is_sfa_with_p_1() -> None:
    world = World(network)
    start = {name: param.detach().clone() for name, param in world.params.items()}
    plain = World(network).run(Method(), 4)[-1]
    averaged = world.run(SFA(p=1.0, beta=0.3), 4)[-1]
    flat_start = torch.cat([value.reshape(-1) for value in start.values()])
    merged = WiSEFT(alpha=0.7).checkpoint({"w": plain}, {"w": flat_start})["w"]
    torch.testing.assert_close(averaged, merged, rtol=0, atol=1e-12)


class Logistic:
    """A one-parameter logistic model with its closed forms: log p(y|x) = log σ((2y−1)·w·x)."""

    def __init__(self, w: float, count: int = 12, past: int = 1) -> None:
        generator = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))
        self.data = {
            f"task{k}": [
                (float(torch.randn(1, generator=generator)), int(torch.randint(0, 2, (1,), generator=generator)))
                for _ in range(count)
            ]
            for k in range(past)
        }

    def tasks(self) -> list[str]:
        return list(self.data)

    def examples(self, task: str | None, count: int, seed: int) -> list[tuple[float, int]]:
        return self.data[task or "task0"][:count]

    def log_likelihood(self, examples: Sequence[Any], labels: str, generator: torch.Generator) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, y in examples:
            p = torch.sigmoid(self.w * x)
            label = y if labels == "data" else int(torch.rand((), generator=generator) < p)
            total = total + torch.log(p if label else 1 - p).sum()
        return total

    def residuals(self, task: str = "task0") -> list[tuple[float, float, float]]:
        """(x, y − σ(wx), σ(wx)(1 − σ(wx))) for each example."""
        w, found = float(self.w), []
        for x, y in self.data[task]:
            p = 1 / (1 + math.exp(-w * x))
            found.append((x, y - p, p * (1 - p)))
        return found


def test_empirical_and_batch_fisher_of_logistic_regression() -> None:
    model = Logistic(0.7)
    params = {"w": model.w}
    empirical = diagonal(params, model, "task0", "empirical", 12, 4, 0)["w"]
    expected = sum((x * r) ** 2 for x, r, _ in model.residuals()) / 12
    assert float(empirical) == pytest.approx(expected, abs=1e-12)
    batch = diagonal(params, model, "task0", "batch", 12, 4, 0)["w"]
    means = [sum(x * r for x, r, _ in model.residuals()[k : k + 4]) / 4 for k in (0, 4, 8)]
    assert float(batch) == pytest.approx(sum(mean**2 for mean in means) / 3, abs=1e-12)
    assert float(batch) != pytest.approx(float(empirical), rel=0.2)


def test_true_fisher_of_logistic_regression() -> None:
    """E over labels of the model: mean of x²·p·(1−p), which no data label enters."""
    model = Logistic(0.7)
    draws = [float(diagonal({"w": model.w}, model, "task0", "true", 12, 1, seed)["w"]) for seed in range(400)]
    mean = sum(draws) / 400
    deviation = (sum((draw - mean) ** 2 for draw in draws) / 399) ** 0.5
    expected = sum(x * x * v for x, _, v in model.residuals()) / 12
    assert abs(mean - expected) < 4 * deviation / 20


def test_fisher_leaves_gradients_as_they_were() -> None:
    model = Logistic(0.2)
    model.w.grad = torch.tensor([3.0], dtype=torch.float64)
    diagonal({"w": model.w}, model, "task0", "empirical", 5, 1, 0)
    assert model.w.grad.tolist() == [3.0]


@in_stretches
def test_ewc_weighs_each_number_with_its_own_fisher() -> None:
    generator = torch.Generator().manual_seed(6)
    start, moved, fisher, gradient = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    param = nn.Parameter(start.clone())
    method = EWC(weight=0.7)
    method.begin(Context({"w": param}, probe=None, resuming=True))
    method.load_state_dict({"w": fisher})

    def grad() -> None:
        param.grad = gradient.clone()

    step_gradient = method.gradient(grad, {"w": param})
    with torch.no_grad():
        param.copy_(moved)
    step_gradient()
    torch.testing.assert_close(param.grad, gradient + 0.7 * fisher * (moved - start), rtol=0, atol=1e-12)


def test_ewc_of_several_tasks_and_its_form_as_a_merge() -> None:
    """g += λF(θ−θ₀) with F ← decay·F + F_task; a step on it is eq. 14: θ ← (1 − ηλF)θ* + ηλFθ₀ (λ = 1 there)."""
    model = Logistic(0.4, past=3)
    method = EWC(weight=1.5, decay=0.5, samples=12)
    method.begin(Context({"w": model.w}, probe=model))
    one = [sum((x * r) ** 2 for x, r, _ in model.residuals(f"task{k}")) / 12 for k in range(3)]
    fisher = (one[0] * 0.5 + one[1]) * 0.5 + one[2]

    def grad() -> None:
        model.w.grad = torch.tensor([0.25], dtype=torch.float64)

    with torch.no_grad():
        model.w.fill_(0.9)
    method.gradient(grad, {"w": model.w})()
    assert float(model.w.grad) == pytest.approx(0.25 + 1.5 * fisher * 0.5, abs=1e-12)
    eta, theta = 0.1, 0.9
    by_gradient = theta - eta * float(model.w.grad)
    penalty_after = (1 - eta * 1.5 * fisher) * theta + eta * 1.5 * fisher * 0.4 - eta * 0.25
    assert by_gradient == pytest.approx(penalty_after, abs=1e-12)
    with pytest.raises(UserError, match="memory"):
        EWC().begin(Context({"w": model.w}, probe=None))


def test_fisher_merge_is_the_weighted_mean_of_eq_15() -> None:
    model = Logistic(0.4, past=2)
    method = FisherMerge(weight=2.0, anchor_weight=0.5, samples=12)
    method.begin(Context({"w": model.w}, probe=model))
    start = sum(sum((x * r) ** 2 for x, r, _ in model.residuals(f"task{k}")) / 12 for k in range(2))
    anchor = {"w": model.w.detach().clone()}
    with torch.no_grad():
        model.w.fill_(1.3)
    method.weights({"w": model.w}, 4, 4)
    end = sum((x * r) ** 2 for x, r, _ in model.residuals("task0")) / 12
    merged = method.checkpoint({"w": model.w.detach()}, anchor)["w"]
    expected = (0.5 * start * 0.4 + 2.0 * end * 1.3) / (0.5 * start + 2.0 * end)
    assert float(merged) == pytest.approx(expected, abs=1e-12)
    method.at_anchor["w"].zero_()
    method.at_end["w"].zero_()
    merged = method.checkpoint({"w": model.w.detach()}, anchor)["w"]
    assert float(merged) == pytest.approx((0.5 * 0.4 + 2.0 * 1.3) / 2.5, abs=1e-12)


def test_distillation_adds_the_divergence_of_the_anchor() -> None:
    """L + λτ²·mean KL(softmax(z₀/τ) ‖ softmax(z/τ)), its gradient by finite formula, weights back bit for bit."""
    world, tau, weight = World(network), 1.7, 0.6

    def logits(theta: Tensor) -> Tensor:
        w1, w2 = theta[:12].reshape(4, 3), theta[12:].reshape(2, 4)
        return torch.tanh(INPUTS @ w1.T) @ w2.T

    def current() -> Tensor:
        return logits(torch.cat([param.reshape(-1) for param in world.params.values()]))

    def inner(batch: Batch) -> Tensor:
        batch.logits = current()
        return nn.functional.cross_entropy(batch.logits, LABELS)

    method = Distill(weight=weight, temperature=tau)
    method.begin(Context(world.params))
    anchor = world.flat()
    with torch.no_grad():
        for param in world.params.values():
            param.add_(0.3)
    moved = world.flat()
    loss = method.loss(inner)(Batch({}, 1 / 7, lambda: current().detach()))
    loss.backward()
    assert torch.equal(world.flat(), moved)

    def reference(theta: Tensor) -> Tensor:
        p, q = (logits(anchor) / tau).softmax(-1), (logits(theta) / tau).softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        return network(theta) + weight * tau**2 * kl

    assert float(loss) == pytest.approx(float(reference(moved)), abs=1e-12)
    found = torch.cat([param.grad.reshape(-1) for param in world.params.values()])
    close([found], [slope(reference, moved)])


def test_take_of_a_list_of_rows() -> None:
    assert [take(["a", "b", "c"], [2, 0])[i] for i in range(2)] == ["c", "a"]


def test_merging_at_a_tasks_end_is_the_merging_of_checkpoints() -> None:
    """FisherMerge and WiSEFT give what the pure functions of holdfast.merge give."""
    from holdfast.merge import fisher, linear

    generator = torch.Generator().manual_seed(8)
    start, end, at_start, at_end = (torch.rand(5, generator=generator) for _ in range(4))
    at_start[0] = at_end[0] = 0.0
    method = FisherMerge(weight=2.0, anchor_weight=0.5)
    method.at_anchor, method.at_end = {"w": at_start}, {"w": at_end}
    merged = method.checkpoint({"w": end}, {"w": start})["w"]
    torch.testing.assert_close(merged, fisher([start, end], [at_start, at_end], [0.5, 2.0]))
    method = FisherMerge(weight=2.0, anchor_weight=0.5, normalize=True)
    method.at_anchor, method.at_end = {"w": at_start}, {"w": 1e-6 * at_end}
    merged = method.checkpoint({"w": end}, {"w": start})["w"]
    torch.testing.assert_close(merged, fisher([start, end], [at_start, at_end], [0.5, 2.0], normalize=True))
    mixed = WiSEFT(alpha=0.3).checkpoint({"w": end}, {"w": start})["w"]
    torch.testing.assert_close(mixed, linear([start, end], weights=[0.7, 0.3]))
