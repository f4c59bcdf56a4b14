"""Laws of every method: a resumed run ends where an uninterrupted one does; pairs of one seam compose as written."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import ACTIVE, LONGER, ON_TEXT
from tiny_world import distance, losses, same_bits, tiny_llama, train, weights, whole_and_resumed
from torch import Tensor, nn

from holdfast import SAM, SFA, Freeze, Method
from holdfast.errors import UserError
from holdfast.method import Context, compose_gradient, compose_loss, describe, seams
from holdfast.methods import METHODS


@pytest.mark.parametrize("name", [*sorted(set(METHODS) - ON_TEXT), *LONGER])
def test_resumed_run_equals_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    """From a checkpoint at a random step, mid-interval of SFA included; the model given on resume is another one."""
    whole, resumed = whole_and_resumed(tmp_path, {**ACTIVE, **LONGER}[name], random.Random(name).randrange(1, 7))
    assert same_bits(weights(whole), weights(resumed))
    assert losses(whole) == losses(resumed)


def test_resume_with_other_methods_or_without_the_start_is_refused(tmp_path: Path) -> None:
    train(tmp_path, [SFA(p=0.5)], save_strategy="steps", save_steps=1)
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="other methods"):
        train(tmp_path, [SFA(p=0.25)], resume=checkpoint)
    for file in (tmp_path / "holdfast").glob("start-*"):
        file.unlink()
    with pytest.raises(UserError, match="anchor="):
        train(tmp_path, [SFA(p=0.5)], resume=checkpoint)
    train(tmp_path / "plain", save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match="without methods"):
        train(tmp_path / "plain", [SAM()], resume=str(tmp_path / "plain" / "checkpoint-2"))


def test_stopping_early_still_ends_with_the_last_average(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    stopped = train(tmp_path, [SFA(p=1.0, beta=0.5)], extra={"callbacks": [Stop()]})
    plain = train(tmp_path, extra={"callbacks": [Stop()]})
    start = {name: param.detach() for name, param in tiny_llama().named_parameters()}
    expected = {name: 0.5 * start[name] + 0.5 * value for name, value in weights(plain).items()}
    assert distance(weights(stopped), expected) <= 1e-7


def toy() -> tuple[dict[str, nn.Parameter], Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(7)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    params = {
        "embed.weight": nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64)),
        "layers.0.w": nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64)),
    }

    def loss_at(theta: Tensor) -> Tensor:
        return torch.tanh(root @ theta).square().sum() + 0.1 * theta.square().sum()

    def grad() -> Tensor:
        for param in params.values():
            param.grad = None
        loss = loss_at(torch.cat(list(params.values())))
        loss.backward()
        return loss.detach()

    return params, grad, lambda theta: torch.func.grad(loss_at)(theta)


def flat(params: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([param.detach() for param in params.values()])


def formulas(theta: Tensor, anchor: Tensor, momentum: Tensor) -> dict[str, Callable[[Any], Any]]:
    """Each gradient method as a function from a gradient field to a gradient field, in plain vectors."""
    frozen = torch.tensor([0.0] * 4 + [1.0] * 2, dtype=torch.float64)

    def where(gradient: Tensor, term: Tensor) -> Tensor:
        return torch.where(gradient != 0, term, torch.zeros_like(term))

    return {
        "sam": lambda g: lambda t: g(t + 0.5 * g(t) / g(t).norm()),
        "msam": lambda g: lambda t: g(t - 0.5 * momentum / momentum.norm()),
        # a penalty leaves weights alone that get no gradient (frozen ones)
        "l2": lambda g: lambda t: g(t) + where(g(t), t - anchor),
        "l1": lambda g: lambda t: g(t) + where(g(t), 0.03 * (t - anchor).sign()),
        "ewc": lambda g: lambda t: g(t) + where(g(t), 0.3 * (t - anchor)),
        "freeze": lambda g: lambda t: g(t) * frozen,
    }


GRADIENT = sorted(name for name in METHODS if "gradient" in seams(ACTIVE.get(name, Method)()))


def test_the_table_of_formulas_has_every_gradient_method() -> None:
    zero = torch.zeros(6)
    assert set(GRADIENT) == set(formulas(zero, zero, zero))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(GRADIENT, 2)), ids=lambda name: name)
def test_two_gradient_methods_are_the_composition_that_plan_prints(first: str, second: str) -> None:
    """The list's first is innermost: second(first(∇L)), to 1e-10 in float64."""
    params, grad, field = toy()
    optimizer = torch.optim.SGD(params.values(), lr=0.0, momentum=0.9)
    grad()
    optimizer.step()
    momentum = torch.cat([optimizer.state[param]["momentum_buffer"] for param in params.values()])
    anchor = flat(params)
    methods = [Freeze(embeddings=True) if name == "freeze" else ACTIVE[name]() for name in (first, second)]
    for method in methods:
        method.begin(Context(params, optimizer=optimizer, resuming=True))
        if method.name == "ewc":
            method.load_state_dict({name: torch.full_like(param, 0.3) for name, param in params.items()})
    with torch.no_grad():
        for index, param in enumerate(params.values()):
            param.add_(0.2 * (index + 1))
    theta = flat(params)
    table = formulas(theta, anchor, momentum)
    expected = table[second](table[first](field))(theta)
    compose_gradient(methods, grad, params)()
    found = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in params.values()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.equal(flat(params), theta)
    assert describe(methods)[0] == f"gradient: {methods[1].label()} ∘ {methods[0].label()}"


def test_loss_methods_nest_in_the_order_of_the_list() -> None:
    class Times(Method):
        def loss(self, loss_fn: Any) -> Any:
            return lambda batch: 3 * loss_fn(batch)

    class Plus(Method):
        def loss(self, loss_fn: Any) -> Any:
            return lambda batch: 1 + loss_fn(batch)

    assert compose_loss([Times(), Plus()], lambda batch: batch)(2) == 7
    assert compose_loss([Plus(), Times()], lambda batch: batch)(2) == 9
