"""DPOptimizer as a torch.optim.Optimizer: checkpoints, copies, groups, hooks and attributes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipgrad import DPOptimizer, SeededNoise
from clipgrad.errors import UnclippedGradientError
from tests.dp_tools import (
    assert_same,
    clipped,
    data,
    mlp,
    private,
    sgd,
    squared,
    through_a_file,
    values,
)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def noisy(model: nn.Module, seed: int | None = 7, **options: Any) -> DPOptimizer:
    """AdamW with noise, repeatable unless the seed is None."""
    noise = None if seed is None else SeededNoise(torch.Generator().manual_seed(seed))
    options = {"inner": adamw(model), "noise_multiplier": 1.0, "noise": noise, **options}
    return private(model, expected_batch_size=4, **options)


def train(optimizer: DPOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.backward(data(3, seed=step))
        optimizer.step()
        optimizer.zero_grad()


def test_a_restored_run_continues_exactly() -> None:
    model, twin, resumed = mlp(), mlp(), mlp()
    train(noisy(twin), range(6))
    optimizer = noisy(model)
    train(optimizer, range(3))
    checkpoint = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed.load_state_dict(checkpoint["model"])
    other = noisy(resumed, seed=99)
    other.load_state_dict(checkpoint["optimizer"])
    train(other, range(3, 6))
    assert_same(values(resumed), values(twin))


def test_system_noise_is_never_repeated() -> None:
    steps = []
    model = mlp()
    optimizer = noisy(model, None, inner=sgd(model))
    train(optimizer, range(1))
    checkpoint = through_a_file([model.state_dict(), optimizer.state_dict()])
    for _ in range(2):
        model = mlp()
        optimizer = noisy(model, None, inner=sgd(model))
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        train(optimizer, range(1, 2))
        steps.append(values(model))
    assert all(not (steps[0][name] == steps[1][name]).any() for name in steps[0])


def test_plain_and_private_checkpoints_load_into_each_other() -> None:
    model, twin = mlp(), mlp()
    plain = adamw(twin)
    squared(twin, data()).backward()
    plain.step()
    optimizer = noisy(model)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state[model[0].weight]["step"] == 1
    train(optimizer, range(1))
    plain.load_state_dict(optimizer.state_dict())
    assert plain.state[twin[0].weight]["step"] == 2
    assert torch.equal(
        plain.state[twin[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"]
    )


def test_loading_drops_the_unfinished_batch() -> None:
    model = mlp()
    optimizer = noisy(model)
    state = optimizer.state_dict()
    optimizer.backward(data())
    optimizer.load_state_dict(state)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UnclippedGradientError, match="no backward"):
        optimizer.step()


def test_loading_another_kind_of_noise_is_refused() -> None:
    optimizer = noisy(mlp())
    with pytest.raises(ValueError, match=r"SeededNoise.*SystemNoise"):
        optimizer.load_state_dict(noisy(mlp(), None).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_an_optimizer_of_its_own(how: str) -> None:
    model = mlp()
    optimizer = noisy(model)
    torch.optim.lr_scheduler.StepLR(
        optimizer, 1
    )  # replaces optimizer.step by a wrapper bound to it
    train(optimizer, range(1))
    optimizer.backward(data())
    if how == "deepcopy":
        twin = copy.deepcopy(optimizer)
    else:
        twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.model is not model
    assert {id(p) for p in twin.model.parameters()} == {
        id(p) for group in twin.param_groups for p in group["params"]
    }
    with pytest.raises(UnclippedGradientError, match="no backward"):
        twin.step()  # the logical batch in progress is not copied
    before = values(model)
    train(twin, range(1, 2))
    assert_same(values(model), before)
    optimizer.zero_grad()
    train(optimizer, range(1, 2))
    assert_same(values(model), values(twin.model))  # a seeded generator is copied with its state


def test_a_shallow_copy_shares_the_model() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = private(model)
    twin = copy.copy(optimizer)
    assert twin.model is model
    model[0].requires_grad_(True)
    sums, norms = clipped(model, data())
    twin.backward(data())
    torch.testing.assert_close(twin.diagnostics.grad_norms, norms)
    torch.testing.assert_close(twin.clipped_sums, sums)


def test_a_copy_with_system_noise_draws_other_noise() -> None:
    model = mlp()
    optimizer = noisy(model, None)
    twin = copy.deepcopy(optimizer)
    train(optimizer, range(1))
    train(twin, range(1))
    assert not any(map(torch.equal, model.parameters(), twin.model.parameters()))


def test_add_param_group() -> None:
    model = mlp()
    optimizer = private(model, inner=torch.optim.SGD(model[2].parameters(), lr=1.0))
    optimizer.backward(data())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
    sums, norms = clipped(model, data())
    before = values(model)
    optimizer.backward(data())
    torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before["0.weight"] - 0.5 * sums["0.weight"])
    assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) == 2


def test_add_param_group_of_a_stranger_is_refused() -> None:
    model = mlp()
    optimizer = private(model)
    stranger = nn.Parameter(torch.ones(3))
    for params in (stranger, [stranger], [("name", stranger)]):
        with pytest.raises(ValueError, match=r"not in the model.*\(3,\).*model\.parameters\(\)"):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    optimizer.inner.add_param_group({"params": stranger})
    with pytest.raises(ValueError, match="not in the model"):
        optimizer.backward(data())


def test_a_stranger_added_after_backward_is_not_stepped() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    stranger = nn.Parameter(torch.ones(3))
    stranger.grad = torch.ones(3)
    optimizer.inner.add_param_group({"params": stranger})
    with pytest.raises(UnclippedGradientError, match=r"\(3,\).*not clipped here"):
        optimizer.step()
    assert torch.equal(stranger, torch.ones(3))


def test_step_hooks_run_around_the_noisy_step() -> None:
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0, expected_batch_size=2)
    seen: list[Any] = []

    def before(inner: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(model[0].weight.grad.clone())

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda inner, args, kwargs: seen.append(inner)),
    ]
    optimizer.backward(data())
    clean = optimizer.clipped_sums["0.weight"]
    optimizer.step()
    assert seen[1] is optimizer.inner
    assert not (seen[0] * 2 == clean).any()  # the hook saw the noise
    assert torch.equal(seen[0], model[0].weight.grad)
    for handle in handles:
        handle.remove()
    optimizer.backward(data())
    optimizer.step()
    assert len(seen) == 2


def test_it_is_an_optimizer_to_those_who_ask() -> None:
    model = mlp()
    inner = adamw(model)
    optimizer = private(model, inner=inner)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert not hasattr(optimizer, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        optimizer.no_such_thing  # noqa: B018
    text = repr(optimizer)
    assert text.startswith("DPOptimizer(max_grad_norm=1.0, noise_multiplier=0.0")
    assert "AdamW (" in text
    optimizer.param_groups = inner.param_groups
    optimizer.state = inner.state
    optimizer.defaults = {**inner.defaults}
    assert inner.defaults is optimizer.defaults


def test_what_is_promised_can_be_read_but_not_changed() -> None:
    norms = {"0": 3.0, "2": 4.0}
    optimizer = private(mlp(), max_grad_norm=norms, noise_multiplier=0.5)
    assert (optimizer.sensitivity, optimizer.sigma) == (5.0, 2.5)
    norms["0"] = 0.1
    assert isinstance(optimizer.max_grad_norm, dict)
    optimizer.max_grad_norm["2"] = 0.1
    assert (optimizer.sensitivity, optimizer.sigma) == (5.0, 2.5)
    promised = ("sensitivity", "sigma", "max_grad_norm", "relation", "expected_batch_size")
    for name in (*promised, "ledger", "diagnostics"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, 0.0)


def test_diagnostics() -> None:
    model, batch = mlp(), data()
    optimizer = private(model)
    with pytest.raises(RuntimeError, match=r"no backward.*backward\(\*batch\)"):
        optimizer.diagnostics  # noqa: B018
    sums, norms = clipped(model, batch)
    bad = torch.cat([batch, torch.full((1, 4), float("inf"), dtype=batch.dtype)])
    optimizer.backward(bad)
    seen = optimizer.diagnostics
    assert isinstance(seen.grad_norms, Tensor)
    torch.testing.assert_close(seen.grad_norms[:5], norms)
    assert not torch.isfinite(seen.grad_norms[5])
    assert seen.losses.shape == (6,)
    assert (seen.batch_size, seen.num_nonfinite) == (6, 1)
    assert 0 < seen.clipped_fraction == float((norms > 1).sum()) / 6 < 1
    torch.testing.assert_close(optimizer.clipped_sums["0.weight"], sums["0.weight"])
