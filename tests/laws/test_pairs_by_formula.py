"""Every pair of methods from different seams, in the Trainer, against one plain loop that knows only the formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import ACTIVE, ON_TEXT
from tiny_world import SGD_RUN, Rows, distance, tiny_llama, train, weights
from torch import Tensor, nn

from holdfast import EWC, FisherMerge, Method
from holdfast.method import seams
from holdfast.methods import METHODS

Vector = dict[str, Tensor]
Loss = Callable[[Vector, Any], Tensor]
Field = Callable[[Vector, Any], Vector]

CASES: dict[str, Callable[[], Method]] = {  # as in the laws, with every example in the Fisher's sample
    **ACTIVE,
    "ewc": lambda: EWC(weight=1.0, samples=99),
    "fisher_merge": lambda: FisherMerge(samples=99),
}
RUN: dict[str, Any] = {
    **SGD_RUN,
    "train_sampling_strategy": "sequential",
    "weight_decay": 0.0,
    "extra": {
        "memory": {"past": Rows(12, seed=5)},
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    },
}
PAIRS = [
    pair
    for pair in itertools.combinations(sorted(set(METHODS) - ON_TEXT), 2)
    if not seams(ACTIVE[pair[0]]()) & seams(ACTIVE[pair[1]]())
]


def norm(vector: Vector) -> Tensor:
    return torch.stack([value.square().sum() for value in vector.values()]).sum().sqrt()


def moved(theta: Vector, direction: Vector, scale: Any) -> Vector:
    return {name: value + scale * direction[name] for name, value in theta.items()}


class PlainLoop:
    """SGD with momentum, clipping and a linear schedule; each method is one line or two, from its formula."""

    def __init__(self, names: tuple[str, ...], batches: list[Any]) -> None:
        self.net, self.names, self.batches = tiny_llama(), names, batches
        self.start: Vector = {name: param.detach().clone() for name, param in self.net.named_parameters()}
        self.momentum: Vector = {}

    def logits(self, theta: Mapping[str, Tensor], batch: Any) -> Tensor:
        """At the supervised tokens."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        made = torch.func.functional_call(self.net, dict(theta), (), inputs).logits
        return made[:, :-1][batch["labels"][:, 1:] != -100]

    def nll(self, theta: Vector, batch: Any) -> Tensor:
        targets = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(self.logits(theta, batch), targets[targets != -100])

    def distilled(self, theta: Vector, batch: Any) -> Tensor:
        with torch.no_grad():
            teacher = (self.logits(self.start, batch) / 2).log_softmax(-1)
        student = (self.logits(theta, batch) / 2).log_softmax(-1)
        divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
        return self.nll(theta, batch) + 2.0 * 2**2 * divergence

    def fisher(self, theta: Vector, examples: list[Any]) -> Vector:
        """Mean over examples of the squared gradient of the log-likelihood, summed over an example's tokens."""
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        for example in examples:
            count = (example["labels"][:, 1:] != -100).sum()
            found = gradient_of(self.nll)(theta, example)
            total = {name: total[name] + (count * found[name]) ** 2 / len(examples) for name in total}
        return total

    def penalty(self, g: Field, term: Callable[[str, Tensor], Tensor]) -> Field:
        return lambda theta, batch: {
            name: value + term(name, theta[name] - self.start[name]) for name, value in g(theta, batch).items()
        }

    def field(self) -> Field:
        """The direction that SGD follows, with the gradient methods of ``names`` around the loss's gradient."""
        g = gradient_of(self.distilled if "distill" in self.names else self.nll)
        if "sam" in self.names:
            at = g
            g = lambda theta, batch: at(moved(theta, d := at(theta, batch), 0.5 / norm(d)), batch)  # noqa: E731
        if "msam" in self.names:
            plain = g

            def g(theta: Vector, batch: Any) -> Vector:
                back = moved(theta, self.momentum, -0.5 / norm(self.momentum)) if self.momentum else theta
                return plain(back, batch)

        if "l2" in self.names:
            g = self.penalty(g, lambda _, difference: difference)
        if "l1" in self.names:
            g = self.penalty(g, lambda _, difference: 0.03 * difference.sign())
        if "ewc" in self.names:
            information = self.fisher(self.start, [one(row) for row in Rows(12, seed=5)])
            g = self.penalty(g, lambda name, difference: information[name] * difference)
        if "freeze" in self.names:
            free = g
            g = lambda theta, batch: {  # noqa: E731
                name: torch.zeros_like(value) if "embed_tokens" in name or "layers.0." in name else value
                for name, value in free(theta, batch).items()
            }
        return g

    def run(self) -> Vector:
        theta, average, g, total = dict(self.start), dict(self.start), self.field(), len(self.batches)
        information = self.fisher(theta, [one(row) for row in Rows(12, seed=5)]) if "fisher_merge" in self.names else {}
        for step, batch in enumerate(self.batches):
            direction = g(theta, batch)
            clip = min(1.0, 1.0 / (float(norm(direction)) + 1e-6))
            self.momentum = {
                name: clip * value + (0.5 * self.momentum[name] if self.momentum else 0.0)
                for name, value in direction.items()
            }
            theta = moved(theta, self.momentum, -0.1 * (total - step) / total)
            if "sfa" in self.names and ((step + 1) % round(0.5 * total) == 0 or step + 1 == total):
                theta = {name: 0.5 * self.start[name] + 0.5 * value for name, value in theta.items()}
            average = {name: 0.7 * average[name] + 0.3 * value for name, value in theta.items()}
        if "ema" in self.names:
            theta = average
        if "wiseft" in self.names:
            theta = {name: 0.5 * self.start[name] + 0.5 * value for name, value in theta.items()}
        if "fisher_merge" in self.names:
            rows = [
                {key: value[i : i + 1] for key, value in b.items()}
                for b in self.batches
                for i in range(len(b["labels"]))
            ]
            mine = self.fisher(theta, rows)
            for name, value in theta.items():
                both = information[name] + mine[name]
                share = torch.where(both > 0, mine[name] / both, 0.5)
                theta[name] = share * value + (1 - share) * self.start[name]
        return theta


def gradient_of(loss: Loss) -> Field:
    def g(theta: Vector, batch: Any) -> Vector:
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        found = torch.autograd.grad(loss(leaves, batch), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    return g


def one(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[None] for key, value in row.items()}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(pair))
def test_a_pair_in_the_trainer_is_what_the_formulas_say(pair: tuple[str, str], tmp_path: Path) -> None:
    """In either order of the list, to 2e-5 in float32."""
    one_way, other = (train(tmp_path, [CASES[name]() for name in names], **RUN) for names in (pair, pair[::-1]))
    batches = [
        {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
        for batch in one_way.get_train_dataloader()
    ]
    expected = PlainLoop(pair, batches).run()
    assert distance(weights(one_way), expected) <= 2e-5
    assert distance(weights(other), expected) <= 2e-5


def test_the_plain_loop_alone_is_plain_training_and_every_method_changes_it(tmp_path: Path) -> None:
    """Were a method ignored on both sides, the test of pairs would pass: here each must matter in the plain loop."""
    plain = train(tmp_path, **RUN)
    batches = [
        {key: batch[key] for key in ("input_ids", "labels", "attention_mask")} for batch in plain.get_train_dataloader()
    ]
    alone = PlainLoop((), batches).run()
    assert distance(weights(plain), alone) <= 2e-5
    for name in sorted({name for pair in PAIRS for name in pair} - {"rehearsal"}):
        assert distance(PlainLoop((name,), batches).run(), alone) > 1e-4, name
