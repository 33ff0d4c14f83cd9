"""Workloads are what they say: reproducible, per-sample, learnable, and exact under clipping.

Where a workload is too big for a test, a twin of the same classes and the same loss stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import clipgrad
from benchmarks.workloads import WORKLOADS, Workload
from benchmarks.workloads.cnn import cnn, images
from benchmarks.workloads.diffusion import UNet, noised
from benchmarks.workloads.huggingface import gpt2, llama_lora, vit
from benchmarks.workloads.state_space import StateSpaceModel
from benchmarks.workloads.transformer import CausalTransformer, tokens
from clipgrad.engine.reference import clipped_sum, per_sample_gradients_by_loop

# PEFT asks Transformers for what it is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
SIZE = 3
SHRUNK: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "cnn-small": (partial(cnn, 8, (3, 4), 6), partial(images, 8)),
    "cnn-medium": (partial(cnn, 8, (3, 4, 5), 6), partial(images, 8)),
    "cnn-large": (partial(cnn, 32, (3, 4, 5, 4, 4), 6), partial(images, 32)),
    **{
        name: (partial(CausalTransformer, 11, 8, 2, layers, 6), partial(tokens, 11, 6))
        for name, layers in {
            "transformer-small": 2,
            "transformer-medium": 3,
            "transformer-768x256": 3,
            "transformer-768x1024": 3,
        }.items()
    },
    "state-space": (partial(StateSpaceModel, 11, 6, 3, 7), partial(tokens, 11, 7)),
    "diffusion": (partial(UNet, (4, 6, 8), 2), partial(noised, 8)),
    "gpt2": (partial(gpt2, 11, 8, 2, 1, 6), partial(tokens, 11, 6)),
    "vit": (partial(vit, 8, 4, 8, 2, 1), partial(images, 8)),
    "llama-lora": (partial(llama_lora, 11, 16, 2, 2, 8), partial(tokens, 11, 6)),
}
# These are small enough to be compared as they are.
AS_THEY_ARE = ("cnn-small", "transformer-small", "state-space", "diffusion")


def twin(name: str) -> Workload:
    model, batch = SHRUNK[name]
    return replace(WORKLOADS[name], model=model, batch=batch)


def made(
    workload: Workload, size: int = SIZE, seed: int = 0
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Model and batch in float64, so that comparisons can be strict."""
    torch.manual_seed(seed)
    model, batch = workload.model(), workload.batch(size)
    return model.double(), tuple(
        leaf.double() if leaf.is_floating_point() else leaf for leaf in batch
    )


def of_parameters(workload: Workload, model: nn.Module) -> Callable[..., Tensor]:
    """The loss as a function of the parameters."""
    names = [name for name, _ in model.named_parameters()]

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *batch: Tensor) -> Tensor:
            return workload.loss(self.model, *batch)

    loss = Loss()

    def fn(params: dict[str, Tensor], *batch: Any) -> Tensor:
        result: Tensor = functional_call(
            loss, {f"model.{name}": params[name] for name in names}, batch
        )
        return result

    return fn


every_workload = pytest.mark.parametrize("name", WORKLOADS)


def test_every_workload_has_a_twin() -> None:
    assert SHRUNK.keys() == WORKLOADS.keys()


@every_workload
def test_fields(name: str) -> None:
    workload = WORKLOADS[name]
    assert workload.name == name
    assert 10 <= len(workload.description) <= 140
    assert workload.description == workload.description.strip()
    assert "\n" not in workload.description
    assert workload.batch_sizes.keys() == {"cpu", "cuda"}
    assert workload.batch_sizes["cuda"], "measured nowhere"
    for sizes in workload.batch_sizes.values():
        assert all(size > 1 for size in sizes)
        assert list(sizes) == sorted(set(sizes))


@every_workload
def test_the_batch_has_the_size_that_was_asked_for(name: str) -> None:
    for size in (1, 3):
        batch = WORKLOADS[name].batch(size)
        assert batch
        assert all(leaf.shape[0] == size for leaf in batch)


@every_workload
def test_a_seed_gives_the_same_weights_and_the_same_batch(name: str) -> None:
    (model, batch), (again, same), (_, other) = (made(twin(name), seed=seed) for seed in (7, 7, 8))
    weights, equal = model.state_dict(), again.state_dict()
    assert weights.keys() == equal.keys()
    assert all(torch.equal(weights[key], equal[key]) for key in weights)
    assert all(torch.equal(leaf, twin_leaf) for leaf, twin_leaf in zip(batch, same, strict=True))
    assert not all(torch.equal(leaf, new) for leaf, new in zip(batch, other, strict=True))


@every_workload
def test_the_loss_is_the_mean_over_samples(name: str) -> None:
    workload = twin(name)
    model, batch = made(workload)
    with torch.no_grad():
        together = workload.loss(model, *batch)
        alone = [workload.loss(model, *(leaf[i : i + 1] for leaf in batch)) for i in range(SIZE)]
    assert together.shape == ()
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-12, atol=1e-12)


@every_workload
def test_the_model_learns(name: str) -> None:
    workload = twin(name)
    model, batch = made(workload, size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = workload.loss(model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    "workload",
    [
        *(pytest.param(twin(name), id=f"{name}-twin") for name in SHRUNK),
        *(pytest.param(WORKLOADS[name], id=name) for name in AS_THEY_ARE),
    ],
)
def test_clipped_sums_equal_the_definition(workload: Workload) -> None:
    model, batch = made(workload)
    params = {name: p.detach() for name, p in model.named_parameters()}
    fn = of_parameters(workload, model)
    losses, gradients = per_sample_gradients_by_loop(fn, params, *batch)
    assert all(gradient.any() for gradient in gradients.values()), "a parameter without gradient"
    norms = clipped_sum(gradients, 1.0)[1]
    # Some samples are clipped, some are not.
    max_grad_norm = norms.median().item()
    sums, norms = clipped_sum(gradients, max_grad_norm)
    for microbatch_size in (None, 1):
        result = clipgrad.clipped_grad(
            fn, max_grad_norm=max_grad_norm, microbatch_size=microbatch_size
        )(params, *batch)
        torch.testing.assert_close(result.values, losses, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.grad_norms, norms, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.grads, sums, rtol=1e-9, atol=1e-9)
