"""Every hostile architecture through DPOptimizer: equal to the loop oracle, or refused; the model untouched."""

from __future__ import annotations

import copy
import gc
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clipgrad import DPOptimizer, Performance
from clipgrad.errors import NotPerSampleError
from tests.architectures import ARCHITECTURES, REPRESENTATIVES, Architecture
from tests.dp_tools import picture, trained, values
from tests.nightly import thinned
from tests.oracle import clipped_sum, per_sample_gradients, sample

BATCH_SIZE = 5
SETTINGS = [(strategy, size) for strategy in ("auto", "ghost") for size in (1, 2, None)]
# vmap has no rule at all for these operations, and clipgrad no decomposition.
UNSUPPORTED = {"dropout_randomised_relu": "vmap cannot batch"}
REFUSED = [a for a in ARCHITECTURES.values() if a.refused or a.name in UNSUPPORTED]
RANDOM = [a for a in ARCHITECTURES.values() if a.random and a.name not in UNSUPPORTED]
EXACT = [a for a in ARCHITECTURES.values() if not (a.refused or a.random)]

# An operation without a batching rule is looped over, which vmap announces; the result is what counts here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # A reentrant checkpoint does not see that its inputs require grad; then it is refused.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


def named(architectures: list[Architecture]) -> list[Any]:
    return [pytest.param(a, id=a.name) for a in architectures]


def optimizer_for(
    model: nn.Module, architecture: Architecture, max_grad_norm: float = 0.1, **options: Any
) -> DPOptimizer:
    return DPOptimizer(
        torch.optim.SGD(trained(model).values(), lr=1.0),
        model,
        architecture.loss,
        max_grad_norm=max_grad_norm,
        noise_multiplier=0.0,
        expected_batch_size=1,
        **options,
    )


def error_of(found: Tensor, expected: Tensor, scale: float) -> float:
    return float((found - expected).abs().max()) / scale if expected.numel() else 0.0


# Each strategy and each size once.
FEW = [("auto", None), ("ghost", 2), ("kept", 1)]
REST = [setting for setting in SETTINGS if setting not in FEW]


@pytest.mark.parametrize("architecture", named(EXACT))
def test_equals_the_loop(architecture: Architecture) -> None:
    assert_equals_the_loop(architecture, FEW)


@pytest.mark.parametrize(
    "architecture",
    thinned(EXACT, lambda a: a.name in REPRESENTATIVES, lambda a: a.name),
)
def test_equals_the_loop_with_other_sizes(architecture: Architecture) -> None:
    assert_equals_the_loop(architecture, REST)


def assert_equals_the_loop(
    architecture: Architecture, settings: list[tuple[str, int | None]]
) -> None:
    model, batch = architecture.build(BATCH_SIZE)
    per_sample = per_sample_gradients(model, architecture.loss, batch)
    norms = clipped_sum(per_sample, 1.0)[1]
    max_grad_norm = float(norms.median())  # some samples are clipped and some are not
    sums, _ = clipped_sum(per_sample, max_grad_norm)
    each = [architecture.loss(model, *sample(batch, index)) for index in range(BATCH_SIZE)]
    losses = torch.stack(each).detach()
    before, weights = picture(model), values(model)
    for strategy, microbatch_size in settings:
        try:
            optimizer = optimizer_for(
                model,
                architecture,
                max_grad_norm,
                performance=Performance(strategy=strategy),
                microbatch_size=microbatch_size,
            )
            mean = optimizer.backward(*batch)
        except NotPerSampleError as error:
            if architecture.may_refuse is None or not re.search(
                architecture.may_refuse, str(error)
            ):
                raise
            assert all(p.grad is None for p in model.parameters())
            assert picture(model) == before
            continue
        seen = optimizer.diagnostics
        assert isinstance(seen.grad_norms, Tensor)
        errors = {
            "loss": error_of(seen.losses, losses, float(losses.abs().max())),
            "mean": error_of(mean, losses.mean(), float(losses.abs().max())),
            "norm": error_of(seen.grad_norms, norms, float(norms.max())),
        }
        for name, total in optimizer.clipped_sums.items():
            errors[name] = error_of(total, sums[name], max_grad_norm)
        assert errors.keys() >= trained(model).keys()
        wrong = {
            name: error for name, error in errors.items() if not error <= architecture.tolerance
        }
        assert not wrong, (strategy, microbatch_size, wrong)
        assert all(p.grad is None for p in model.parameters())
        assert picture(model) == before
    for name, value in values(model).items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("architecture", named(REFUSED))
@pytest.mark.parametrize("microbatch_size", [1, None])
def test_refused_with_a_reason_and_no_trace(
    architecture: Architecture, microbatch_size: int | None
) -> None:
    model, batch = architecture.build(BATCH_SIZE)
    before, weights = picture(model), values(model)
    expected = UNSUPPORTED.get(architecture.name) or architecture.refused
    assert expected is not None
    with pytest.raises(NotPerSampleError, match=expected):
        optimizer_for(model, architecture, microbatch_size=microbatch_size).backward(*batch)
    assert all(p.grad is None for p in model.parameters())
    assert picture(model) == before
    for name, value in values(model).items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("architecture", named(RANDOM))
def test_random_models_draw_for_each_sample(architecture: Architecture) -> None:
    model, batch = architecture.build(BATCH_SIZE)
    first = sample(batch, 0)
    alike = tree_map(lambda leaf: leaf.repeat(16, *[1] * (leaf.dim() - 1)), first)
    before = picture(model)
    losses = {}
    for randomness in ("different", "same"):
        optimizer = optimizer_for(
            model, architecture, performance=Performance(randomness=randomness)
        )
        torch.manual_seed(3)
        optimizer.backward(*alike)
        optimizer.zero_grad()
        losses[randomness] = optimizer.diagnostics.losses
    assert len(losses["different"].unique()) > 4
    spread = losses["same"].max() - losses["same"].min()
    assert spread <= 1e-9 * losses["same"].abs().max()
    assert picture(model) == before


@pytest.mark.parametrize("architecture", named(RANDOM))
def test_random_models_agree_between_strategies(architecture: Architecture) -> None:
    model, batch = architecture.build(BATCH_SIZE)
    found = []
    for strategy in ("auto", "ghost"):
        optimizer = optimizer_for(model, architecture, performance=Performance(strategy=strategy))
        torch.manual_seed(5)
        optimizer.backward(*batch)
        found.append(optimizer.clipped_sums)
        assert all(torch.isfinite(gradient).all() for gradient in found[-1].values())
        optimizer.zero_grad()
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "architecture",
    thinned(EXACT, lambda a: a.name in REPRESENTATIVES, lambda a: a.name),
)
def test_no_tensor_outlives_the_step(architecture: Architecture) -> None:
    # A graph that only the garbage collector finds, or not even that, is the memory of a whole batch.
    model, batch = architecture.build(BATCH_SIZE)

    def tensors_after_a_step() -> int:
        optimizer.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    gc.disable()
    gc.collect()
    gc.freeze()  # get_objects then lists new objects only; tests/conftest.py freezes more, so nothing is given back
    try:
        optimizer = optimizer_for(model, architecture)
        first, second, third = (tensors_after_a_step() for _ in range(3))
    except NotPerSampleError:
        assert architecture.may_refuse is not None
    else:
        assert first == second == third
    finally:
        gc.enable()


def test_a_copied_model_trains_on_its_own() -> None:
    architecture = ARCHITECTURES["lstm"]
    model, batch = architecture.build(BATCH_SIZE)
    found = []
    for one in (model, None):
        optimizer = optimizer_for(one or copy.deepcopy(model), architecture)
        optimizer.backward(*batch)
        found.append(optimizer.clipped_sums)
    assert found[0].keys() == trained(model).keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
