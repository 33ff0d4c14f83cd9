"""Where a step's time goes: by a clock that only moves when told to, so that every second is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, Performance, SeededNoise, _phases, profile_step
from clipgrad._phases import PHASES
from clipgrad.clipping import Clipping
from clipgrad.engine.gradients import Gradients
from clipgrad.engine.tracked import Tracked
from clipgrad.errors import NotPerSampleError
from clipgrad.optimizer.pending import Pending
from clipgrad.profile import StepProfile
from clipgrad.profile._measure import profile_with
from tests.clocked import CLOCK, slow
from tests.dp_tools import assert_same, data, mlp, picture, private, squared, values


@pytest.fixture(autouse=True)
def nobody_is_left_listening() -> Iterator[None]:
    yield
    assert _phases._listener is None


def slower(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, seconds: float) -> None:
    """Have a method of the library take so many seconds more."""
    original = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        CLOCK.work(seconds)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def by_clock(optimizer: DPOptimizer, *batch: Any, rounds: int = 3) -> StepProfile:
    return profile_with(CLOCK, optimizer, batch, rounds=rounds, warm_up=1)


# ------------------------------------------------------------------ phases


def test_every_second_is_in_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    slower(monkeypatch, Tracked, "receive", 50)  # a call for weight and bias each
    slower(monkeypatch, Gradients, "squared_norms", 60)  # one call for both
    slower(monkeypatch, Clipping, "factors", 7)
    slower(monkeypatch, Gradients, "weighted_sum", 300)
    slower(monkeypatch, Pending, "add", 8)
    profile = by_clock(slow(), torch.ones(5, 4))
    assert profile.phases == {
        "forward": 3,
        "backward": 4,
        "per-sample gradients": 100,
        "norms": 67,
        "contraction": 600,
        "bookkeeping": 8,
        "noise": 2,
        "optimizer": 1,
    }
    assert tuple(profile.phases) == PHASES
    assert profile.standard_phases == {"forward": 3, "backward": 4, "optimizer": 1}
    assert profile.clipped == sum(profile.phases.values())
    assert profile.standard == 8
    assert profile.ratio == 785 / 8


def test_the_clock_is_read_once_a_boundary() -> None:
    ticks = iter(range(10**6))
    profile = profile_with(lambda: next(ticks), private(mlp()), (data(),), rounds=3, warm_up=0)
    # One tick a boundary: no phase begins or ends without the clock being read, none is read twice.
    assert all(seconds > 0 for seconds in profile.phases.values())
    assert profile.standard_phases == {"forward": 1, "backward": 1, "optimizer": 1}
    assert profile.clipped == profile.standard == 1


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({}, 1),
        ({"microbatch_size": 2}, 3),
        ({"max_grad_norm": {"weight": 1.0, "bias": 0.5}}, 1),
        ({"performance": Performance(strategy="ghost"), "microbatch_size": 3}, 2),
    ],
)
def test_microbatches_and_groups(options: dict[str, Any], forwards: int) -> None:
    profile = by_clock(slow(**options), torch.ones(5, 4))
    assert profile.phases["forward"] == 3 * forwards
    assert profile.phases["backward"] == 4 * forwards
    assert profile.phases["noise"] == 2
    assert profile.standard == 8
    assert profile.microbatch_size == options.get("microbatch_size")


@pytest.mark.parametrize("where", [Tracked, Clipping])
def test_a_step_that_fails_leaves_nobody_listening(
    where: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        if _phases._listener is not None:
            raise ZeroDivisionError

    name = "receive" if where is Tracked else "factors"
    original = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: fail() or original(*args))
    optimizer = private(mlp())
    with pytest.raises(ZeroDivisionError):
        profile_step(optimizer, data(), rounds=1)
    monkeypatch.undo()
    assert profile_step(optimizer, data(), rounds=1).batch_size == 5


# ------------------------------------------------------------------ what stays as it was


def dropout_loss(model: nn.Module, x: Tensor) -> Tensor:
    return squared(model, nn.functional.dropout(x, 0.5))


def test_nothing_of_the_caller_changes() -> None:
    model = mlp()
    generator = torch.Generator().manual_seed(3)
    optimizer = private(
        model,
        dropout_loss,
        inner=torch.optim.AdamW(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        noise=SeededNoise(generator),
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)  # wraps the method step
    optimizer.backward(data())
    optimizer.step()  # AdamW has a state now, and .grad still shows the gradient of this step
    weights, shown = values(model), [p.grad for p in model.parameters()]
    gradients = [g.clone() for g in shown if g is not None]
    before, diagnostics = picture(model), optimizer.diagnostics
    state, drawn, everywhere = (
        str(optimizer.state_dict()),
        generator.get_state(),
        torch.get_rng_state(),
    )
    profile_step(optimizer, data(), rounds=2)
    assert_same(values(model), weights)
    assert picture(model) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), shown, strict=True))
    assert all(map(torch.equal, [g for g in shown if g is not None], gradients))
    assert str(optimizer.state_dict()) == state
    assert torch.equal(generator.get_state(), drawn)
    assert torch.equal(torch.get_rng_state(), everywhere)
    assert optimizer.diagnostics == diagnostics
    optimizer.zero_grad()
    optimizer.backward(data())
    optimizer.step()


def test_the_copies_train() -> None:
    """Else the profile would measure an optimizer that holds other parameters than the model."""
    seen: list[float] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        if not torch._C._functorch.maybe_current_level():  # the standard step
            seen.append(float(next(model.parameters()).detach().sum()))
        return squared(model, x)

    profile_step(private(mlp(), loss), data(), rounds=3, warm_up=1)
    assert len(set(seen)) == len(seen) == 7  # each of 1 + 2 * 3 steps found other weights


def test_parameters_of_others_are_constants_in_both_steps() -> None:
    model = mlp()
    optimizer = private(model, inner=torch.optim.SGD(model[0].parameters(), lr=0.1))
    seen: list[list[bool]] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append([p.requires_grad for p in model[2].parameters()])  # type: ignore[index]
        return squared(model, x)

    optimizer.loss_fn = loss
    profile_step(optimizer, data(), rounds=1, warm_up=0)
    assert all(not any(flags) for flags in seen)
    assert all(p.requires_grad for p in model.parameters())


def test_it_runs_under_no_grad() -> None:
    with torch.no_grad():
        assert profile_step(private(mlp()), data(), rounds=1).batch_size == 5


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda o: profile_step(o, data()[:0]), ValueError, ("batch", "0 samples", "pass a batch")),
        (lambda o: profile_step(o), ValueError, ("the batch", "profile_step(optimizer, *batch)")),
        (lambda o: profile_step(o, 3), ValueError, ("no tensor", "batch axis", "pass")),
        (lambda o: profile_step(o, data(), rounds=0), ValueError, ("rounds", "positive", "got 0")),
        (lambda o: profile_step(o, data(), rounds=2.0), ValueError, ("rounds", "got 2.0")),
        (lambda o: profile_step(o, data(), warm_up=-1), ValueError, ("warm_up", "got -1", "first")),
        (lambda o: profile_step(o.inner, data()), TypeError, ("optimizer", "got SGD", "wrap it")),
    ],
)
def test_arguments(
    call: Callable[[DPOptimizer], StepProfile], error: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        call(private(mlp()))
    for word in words:
        assert word in str(caught.value)


def test_no_profile_inside_an_unfinished_logical_batch() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    with pytest.raises(RuntimeError, match=r"unfinished logical batch.*zero_grad\(\) first"):
        profile_step(optimizer, data())
    optimizer.step()
    profile_step(optimizer, data(), rounds=1)


def test_an_optimizer_that_cannot_be_copied() -> None:
    model = mlp()
    model.derived = model[0].weight * 2
    with pytest.raises(RuntimeError, match=r"optimizer cannot be copied.*fresh optimizer"):
        profile_step(private(model), data())


def test_what_backward_refuses_is_said_by_backward() -> None:
    with pytest.raises(NotPerSampleError, match="branches on the value"):
        profile_step(private(mlp(), lambda m, x: squared(m, x if x.sum() > 0 else -x)), data())
