"""Scans of small causal language models: exact token losses, subspaces, checkpoints, compute types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.errors import UserError
from holdfast.landscape import (
    TokenLoss,
    curvature,
    evaluation_loss,
    line,
    pca,
    plane,
    project,
    sharpness,
    surface,
    surfaces,
    token_loss,
)


def llama(seed: int = 0, tie: bool = True, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, tie_word_embeddings=tie, **settings)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches(padded: bool = True) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    made = []
    for rows, width in ((3, 12), (2, 9)):
        ids = torch.randint(1, 64, (rows, width), generator=g)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, :3] = -100
        if padded:
            labels[0, width - 2 :], mask[0, width - 2 :] = -100, 0
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Words:
    """A tokenizer of single characters."""

    eos_token_id, pad_token_id = 1, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(c) % 60 for c in text]}


def test_the_loss_is_the_token_mean_over_batches_of_different_length() -> None:
    model, data = llama(), batches()
    total, count = 0.0, 0
    for batch in data:  # plain reference: one sequence and one token at a time
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
            length = int(mask.sum())
            with torch.no_grad():
                logp = model(input_ids=ids[None, :length]).logits[0].double().log_softmax(-1)
            for t in range(1, length):
                if labels[t] != -100:
                    total, count = total - float(logp[t - 1, labels[t]]), count + 1
    assert evaluation_loss(model, data) == pytest.approx(total / count, rel=1e-6)
    assert TokenLoss(tuple(data)).tokens == count


def test_one_batch_has_the_loss_that_transformers_reports() -> None:
    model, batch = llama(), batches()[0]
    with torch.no_grad():
        theirs = float(model(**batch).loss)
    assert evaluation_loss(model, [batch]) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_centre_is_the_evaluation_loss_and_the_weights_come_back(compute: str) -> None:
    model, data = llama(), batches()
    before = weights(model)
    model.train()
    found = surface(model, data, grid=3, range=0.1, compute=compute)
    assert found.centre == found.grid[1, 1] == evaluation_loss(model, data, compute=compute)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.training and model.dtype == torch.float32
    assert found.meta["parameters"] == sum(p.numel() for p in model.parameters())
    exact = surface(model, data, grid=3, range=0.1).grid
    assert np.abs(found.grid - exact).max() <= (0 if compute == "float32" else 0.03)
    assert compute == "float32" or not np.array_equal(found.grid, exact)


def test_a_point_is_the_loss_of_a_model_built_at_that_point() -> None:
    from holdfast.landscape import noise_tensors

    model, data = llama(), batches()
    found = surface(model, data, grid=3, range=0.2, seed=7)
    d1, d2 = (noise_tensors(model, seed=7, number=i, kind="filter") for i in (0, 1))
    other = llama(1)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(dict(model.named_parameters())[name] + 0.2 * d1[name] - 0.2 * d2[name])
    assert found.grid[2, 0] == pytest.approx(evaluation_loss(other, data), rel=1e-6)


def test_a_tied_embedding_moves_once_and_keeps_being_tied() -> None:
    tied, untied = llama(), llama(tie=False)
    found = surface(tied, batches(), grid=3, range=0.1)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert surface(untied, batches(), grid=3, range=0.1).meta["parameters"] - found.meta["parameters"] == 64 * 16


def test_one_seed_is_one_plane_for_every_model_of_an_architecture() -> None:
    from holdfast.landscape import noise_tensors

    first, second = (noise_tensors(llama(seed), seed=3) for seed in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_seeds_give_several_planes_around_one_centre() -> None:
    planes = surfaces(llama(), batches(), seeds=(0, 1), grid=3, range=0.3)
    assert planes[0].centre == planes[1].centre
    assert not np.array_equal(planes[0].grid, planes[1].grid)


def test_a_lora_model_moves_in_its_adapters_only() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    before = weights(model)
    found = surface(model, batches(), grid=3, range=0.5)
    assert found.meta["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad) < 1000
    assert np.ptp(found.grid) > 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert surface(model, batches(), grid=3, scope="all").meta["parameters"] > 1000
    assert sharpness(model, batches(), directions=1).gradient_norm > 0


def test_weights_stored_in_bfloat16_are_warned_about() -> None:
    found = surface(llama().to(torch.bfloat16), batches(), grid=3, range=0.1)
    assert "24 bits" in " ".join(found.notes())


def test_the_plane_through_three_checkpoints_meets_all_three(tmp_path: Path) -> None:
    base, a, b = llama(0), llama(1), llama(2)
    data = batches()
    a.save_pretrained(tmp_path / "a")
    made = plane(base, tmp_path / "a", weights(b), labels=("base", "A", "B"))
    (_, at_a, at_b) = (mark.points[0] for mark in made.marks)
    low_a, high_a, low_b, high_b = made.extent()
    assert low_a < 0 < at_a[0] < high_a and low_b < 0 < at_b[1] < high_b
    found = surface(base, data, directions=made, grid=3, range=(0.0, at_a[0], 0.0, at_b[1]))
    assert found.grid[0, 0] == found.centre == evaluation_loss(base, data)
    assert found.grid[2, 0] == pytest.approx(evaluation_loss(a, data), rel=1e-5)
    on_b = surface(base, data, directions=made, grid=3, range=(at_b[0], at_b[0] + 1, at_b[1], at_b[1] + 1))
    assert on_b.grid[0, 0] == pytest.approx(evaluation_loss(b, data), rel=1e-5)
    assert on_b.centre == found.centre
    assert found.meta["norms"] == pytest.approx([1, 1], rel=1e-5)
    assert found.meta["cosine"] == pytest.approx(0, abs=1e-5)
    assert project(base, made, weights(b)) == pytest.approx((*at_b, 0.0), abs=1e-3)
    with pytest.raises(UserError, match="one line"):
        plane(base, weights(a), weights(a))


def test_the_main_directions_of_a_training_are_those_of_an_svd() -> None:
    model = llama(0)
    steps = [weights(llama(seed)) for seed in (1, 2, 3)]
    made = pca(model, steps)
    rows = torch.stack(
        [torch.cat([(s[n] - p.detach()).flatten() for n, p in model.named_parameters()]) for s in steps]
    ).double()
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    path = np.array(made.marks[0].points)
    assert path[-1].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(np.abs(path[:-1]), np.abs((rows @ right[:2].T).numpy()), rtol=1e-4, atol=1e-4)
    assert made.explained == pytest.approx((singular[:2] ** 2 / (singular**2).sum()).tolist(), rel=1e-5)
    with pytest.raises(UserError, match="two checkpoints"):
        pca(model, steps[:1])


def test_a_line_ends_exactly_at_its_checkpoints_and_has_a_barrier() -> None:
    a, b, data = llama(1), llama(2), batches()
    model = llama(0)
    before = weights(model)
    found = line(model, data, weights(a), weights(b), points=5, beyond=0.25)
    assert found.t.tolist() == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert found.losses[1] == evaluation_loss(a, data)
    assert found.losses[5] == evaluation_loss(b, data)
    inside = found.losses[1:6]
    chord = np.linspace(inside[0], inside[-1], 5)
    assert found.barrier == pytest.approx(max(0.0, (inside - chord).max()))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert line(model, data, None, weights(model), points=3).barrier == 0.0
    assert line(model, data, None, weights(a), points=3).losses[0] == evaluation_loss(model, data)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    small = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                         num_attention_heads=2))  # fmt: skip
    with pytest.raises(UserError, match=r"embed_tokens.*shape"):
        line(llama(), batches(), None, weights(small))
    with pytest.raises(UserError, match="no tensor"):
        line(llama(), batches(), None, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="no safetensors"):
        line(llama(), batches(), None, tmp_path)


def test_curvature_of_a_language_model_is_the_second_difference_of_its_loss() -> None:
    pytest.importorskip("hessian_eigenthings")
    model = llama().double()
    objective = TokenLoss(tuple(batches()))
    auto, difference = (
        curvature(model, objective, eigenvalues=1, iterations=25, probes=2, product=p)  # type: ignore[arg-type]
        for p in ("autograd", "finite_difference")
    )
    assert auto.eigenvalues == pytest.approx(difference.eigenvalues, rel=1e-3)
    assert auto.trace == pytest.approx(difference.trace, rel=1e-3)
    # the same number from the loss alone: along a Rademacher probe the grid's curvature is vᵀHv
    generator = torch.Generator().manual_seed(0)
    sizes = [p.numel() for p in model.parameters()]
    probe = (torch.randint(0, 2, (sum(sizes),), generator=generator).double() * 2 - 1).split(sizes)
    v = {n: piece.view_as(p) for piece, (n, p) in zip(probe, model.named_parameters(), strict=True)}
    grid = surface(model, objective, directions=[v, v], grid=3, range=1e-4).grid
    alone = (grid[2, 1] - 2 * grid[1, 1] + grid[0, 1]) / 1e-8
    one = curvature(model, objective, eigenvalues=1, iterations=1, probes=1).trace
    assert one == pytest.approx(alone, rel=1e-3)


def test_the_subset_is_seeded_and_masks_prompts() -> None:
    rows = [{"prompt": "ab" * (i + 1), "completion": "xyz"} for i in range(20)]
    first, again, other = (token_loss(rows, Words(), examples=5, seed=s, batch_tokens=64) for s in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.tokens == 5 * 4  # three letters and the end
    for batch in first.batches:
        assert batch["input_ids"].numel() <= 64
        kept = batch["input_ids"][batch["labels"] != -100]
        assert set(kept.tolist()) <= {2 + ord(c) % 60 for c in "xyz"} | {1}
    assert token_loss([{"text": "hello"}], Words()).tokens == 5
    assert token_loss(rows, Words(), compute="bfloat16").fingerprint() != token_loss(rows, Words()).fingerprint()
    with pytest.raises(UserError, match="expected prompt"):
        token_loss([{"question": "a"}], Words())
    with pytest.raises(UserError, match="supervised"):
        token_loss([{"prompt": "abcdef", "completion": "x"}], Words(), max_length=4)
    with pytest.raises(UserError, match="tokenizer"):
        surface(llama(), rows)
