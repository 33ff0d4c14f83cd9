"""The architectures and the oracle are themselves in order, without any of clipgrad."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.architectures import ARCHITECTURES, Architecture
from tests.hf_models import HF_MODELS
from tests.oracle import Gradients, clipped_sum, per_sample_gradients, sample

BATCH_SIZE = 3
EXACT = [a for a in ARCHITECTURES.values() if a.refused is None]
DETERMINISTIC = [a for a in EXACT if not a.random]
# Recurrent operations have no vmap rule in torch: these need clipgrad's own.
RECURRENT = ("rnn", "lstm", "gru", "encoder_decoder")
# PyTorch's own vmap(grad) of its resampling fails there; later versions run it.
FAILS_ON_2_11 = "spatial_transformer" if torch.__version__.startswith("2.11") else None


def named(architectures: list[Architecture]) -> list[Any]:
    return [pytest.param(a, id=a.name) for a in architectures]


class LossModule(nn.Module):
    """The loss as a module's forward: functional_call then reaches what the loss itself reads."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.model = model
        self.loss = architecture.loss

    def forward(self, *batch: Any) -> Tensor:
        return self.loss(self.model, *batch)


def vmap_of_grad(model: nn.Module, architecture: Architecture, batch: tuple[Any, ...]) -> Gradients:
    module = LossModule(model, architecture)
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def loss(parameters: Gradients, one: tuple[Any, ...]) -> Tensor:
        one = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), one)
        return torch.func.functional_call(module, parameters, one)

    with warnings.catch_warnings():
        # Operations without a batching rule announce that they loop; here only the result counts.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, batch)
    return {name.removeprefix("model."): value for name, value in found.items()}


def test_enough_architectures_of_every_sort() -> None:
    assert len(DETERMINISTIC) >= 250
    assert len(ARCHITECTURES) - len(EXACT) >= 15
    assert all(name == a.name and a.why for name, a in ARCHITECTURES.items())


@pytest.mark.parametrize("architecture", named(list(ARCHITECTURES.values())))
def test_architecture(architecture: Architecture) -> None:
    """One test for each, since making the model takes longer than any of the questions."""
    check_small_and_repeatable(architecture)
    if architecture.refused is not None:
        return
    model, batch = architecture.build(BATCH_SIZE)
    check_losses(architecture, model, batch)
    if architecture.random:
        return
    found = per_sample_gradients(model, architecture.loss, batch)
    assert list(found) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert any(gradient.abs().max() > 1e-6 for gradient in found.values())
    assert all(p.grad is None for p in model.parameters())
    check_vmap_of_grad(architecture, found)


def check_small_and_repeatable(architecture: Architecture) -> None:
    (first, batch), (second, again) = architecture.build(2), architecture.build(2)
    assert 0 < sum(p.numel() for p in first.parameters()) < 2000
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)
        assert left.dtype is torch.float64
    for one, other in zip(pytree.tree_leaves(batch), pytree.tree_leaves(again), strict=True):
        assert torch.equal(one, other)
        assert len(one) == 2


def check_losses(architecture: Architecture, model: nn.Module, batch: tuple[Any, ...]) -> None:
    """A whole batch and a batch of one have a loss."""
    for part in (batch, sample(batch, 1)):
        value = architecture.loss(model, *part)
        assert value.ndim == 0
        assert torch.isfinite(value)


def check_vmap_of_grad(architecture: Architecture, expected: Gradients) -> None:
    """The oracle equals ``vmap(grad)`` where that works."""
    model, batch = architecture.build(BATCH_SIZE)
    try:
        found = vmap_of_grad(model, architecture, batch)
    except RuntimeError:
        fails = architecture.name.startswith(RECURRENT) or architecture.name == FAILS_ON_2_11
        if architecture.may_refuse is None and not fails:
            raise
        return
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = architecture.tolerance
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("architecture", named(list(HF_MODELS.values())))
def test_oracle_runs_on_hugging_face_models(architecture: Architecture) -> None:
    pytest.importorskip("transformers")
    model, batch = architecture.build(BATCH_SIZE)
    found = per_sample_gradients(model, architecture.loss, batch)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert sum(bool(gradient.abs().max() > 1e-9) for gradient in found.values()) >= len(found) - 1


def test_clipped_sum_by_hand() -> None:
    # Norms 5, 1 and 0: only the first sample is clipped, the last must not divide by zero.
    per_sample = {
        "a": torch.tensor([[3.0], [1.0], [0.0]]),
        "b": torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]]),
    }
    sums, norms = clipped_sum(per_sample, 2.0)
    torch.testing.assert_close(norms, torch.tensor([5.0, 1.0, 0.0]))
    torch.testing.assert_close(sums["a"], torch.tensor([3.0 * 2 / 5 + 1.0]))
    torch.testing.assert_close(sums["b"], torch.tensor([[4.0 * 2 / 5, 0.0]]))


def test_oracle_leaves_existing_gradients_alone() -> None:
    model, batch = ARCHITECTURES["mlp"].build(2)
    kept = [torch.ones_like(p) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient
    per_sample_gradients(model, ARCHITECTURES["mlp"].loss, batch)
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.ones_like(gradient))
