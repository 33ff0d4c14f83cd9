"""Who may write to .grad: the optimizer alone. What others write is refused, or never reaches a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, SeededNoise
from clipgrad.errors import UnclippedGradientError
from tests.dp_tools import assert_same, clipped, data, mlp, private, squared, trained, values

Act = Callable[[DPOptimizer, nn.Sequential], object]


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in trained(model).values()]
    assert all(gradient is not None for gradient in found)
    return found  # type: ignore[return-value]


def test_gradients_are_none_until_they_have_noise() -> None:
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0)
    for _ in range(2):
        for seed in (1, 2):
            optimizer.backward(data(seed=seed))
            assert all(p.grad is None for p in model.parameters())
        sums = optimizer.clipped_sums
        optimizer.step()
        for name, parameter in trained(model).items():
            assert parameter.grad is not None
            assert not (parameter.grad == sums[name]).any()


def test_another_optimizer_of_the_same_parameters_releases_nothing() -> None:
    model = mlp()
    optimizer, before = private(model, noise_multiplier=1.0), values(model)
    optimizer.backward(data())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.optim.AdamW(model.parameters(), weight_decay=0.0, foreach=True).step()
    assert_same(values(model), before)
    with pytest.raises(UnclippedGradientError, match="before noise was added to the clipped sums"):
        optimizer.inner.step()
    assert_same(values(model), before)


def test_the_sums_are_shown_as_copies() -> None:
    model = mlp()
    optimizer, before = private(model), values(model)
    for ask in (lambda: optimizer.clipped_sums, optimizer.step):
        with pytest.raises(UnclippedGradientError, match="no backward"):
            ask()
    sums, _ = clipped(model, data())
    optimizer.backward(data())
    torch.testing.assert_close(optimizer.clipped_sums, sums)
    for total in optimizer.clipped_sums.values():
        total.data.fill_(1000.0)
    optimizer.step()
    for name, total in sums.items():
        torch.testing.assert_close(model.get_parameter(name), before[name] - total)
    with pytest.raises(UnclippedGradientError, match=r"after step, \.grad holds the noised mean"):
        optimizer.clipped_sums  # noqa: B018


def backward_by_hand(_: DPOptimizer, model: nn.Sequential) -> None:
    squared(model, data()).backward()


def assign(_: DPOptimizer, model: nn.Sequential) -> None:
    model[0].weight.grad = torch.ones_like(model[0].weight)


def show_the_sums(optimizer: DPOptimizer, model: nn.Sequential) -> None:
    model[2].bias.grad = optimizer.clipped_sums["2.bias"]


@pytest.mark.parametrize("act", [backward_by_hand, assign, show_the_sums])
def test_a_step_on_foreign_gradients_is_refused(act: Act) -> None:
    model = mlp()
    optimizer, before = private(model, noise_multiplier=1.0), values(model)
    optimizer.backward(data())
    act(optimizer, model)
    with pytest.raises(
        UnclippedGradientError, match=r"'[02]\.(weight|bias)'.*written by other code"
    ):
        optimizer.step()
    assert_same(values(model), before)
    with pytest.raises(
        UnclippedGradientError, match=r"Only DPOptimizer may write gradients.*zero_grad\(\)"
    ):
        optimizer.backward(data())  # as the second call of a logical batch
    optimizer.zero_grad()  # the way out that the message names
    optimizer.backward(data())
    optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_foreign_gradients_before_the_first_backward(set_to_none: bool) -> None:
    model = mlp()
    squared(model, data()).backward()
    optimizer, before = private(model), values(model)
    with pytest.raises(UnclippedGradientError, match=r"written.*loss\.backward\(\)"):
        optimizer.backward(data())
    assert_same(values(model), before)
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.backward(data())
    torch.testing.assert_close(optimizer.clipped_sums, clipped(model, data())[0])


def test_the_noise_is_added_in_place() -> None:
    """No copy of all sums between ``backward`` and ``step``."""
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0)
    optimizer.backward(data())
    assert optimizer._pending._sums is not None
    addresses = [total.data_ptr() for total in optimizer._pending._sums]
    optimizer.step()
    assert [gradient.data_ptr() for gradient in grads(model)] == addresses


def test_a_grad_scaler_is_refused() -> None:
    model = mlp()
    for inner in (None, torch.optim.AdamW(model.parameters(), fused=True)):
        optimizer = private(model, inner=inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        optimizer.backward(data())
        with pytest.raises(UnclippedGradientError, match=r"GradScaler.*bfloat16.*enabled=False"):
            scaler.step(optimizer)
        optimizer.zero_grad()
    off = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.backward(data())
    off.step(optimizer)
    off.update()


# ------------------------------------------------ parameters outside of the logical batch


def test_a_frozen_parameter_with_an_old_gradient_is_not_stepped() -> None:
    model = mlp()
    squared(model, data()).backward()
    model[0].requires_grad_(False)
    model[2].zero_grad()
    optimizer, before = private(model), values(model)
    optimizer.backward(data())
    with pytest.raises(
        UnclippedGradientError, match=r"\(6, 4\).*frozen.*not clipped here.*zero_grad"
    ):
        optimizer.step()
    assert_same(values(model), before)


def test_a_parameter_unfrozen_after_backward_is_not_stepped_on_a_foreign_gradient() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer, before = private(model), values(model)
    optimizer.backward(data())
    model[0].requires_grad_(True)
    squared(model, data()).backward(inputs=list(model[0].parameters()))
    with pytest.raises(UnclippedGradientError, match="was not trained by backward"):
        optimizer.step()
    assert_same(values(model), before)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_trained_parameters_stay_the_same_within_a_logical_batch(freeze: bool) -> None:
    # Else a parameter frozen between two calls would be stepped on its sum without noise.
    model = mlp()
    model[0].requires_grad_(freeze)
    optimizer, before = private(model, noise_multiplier=1.0), values(model)
    optimizer.backward(data())
    model[0].requires_grad_(not freeze)
    with pytest.raises(
        UnclippedGradientError, match=r"changed within a logical batch.*zero_grad\(\)"
    ):
        optimizer.backward(data())
    assert_same(values(model), before)
    optimizer.zero_grad()
    optimizer.backward(data())
    optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"]) is freeze


def test_a_frozen_parameter_stays_once_gradients_are_cleared() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    optimizer.step()
    before = values(model)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    optimizer.backward(data())
    optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])


# ------------------------------------------------------------- step, backward, zero_grad


def test_a_step_needs_a_backward() -> None:
    model = mlp()
    optimizer, before = private(model), values(model)
    with pytest.raises(UnclippedGradientError, match=r"step: no backward.*empty batch is legal"):
        optimizer.step()
    squared(model, data()).backward()
    with pytest.raises(UnclippedGradientError, match="step: no backward"):
        optimizer.step()
    assert_same(values(model), before)
    optimizer.zero_grad()
    optimizer.backward(data())
    optimizer.step()
    after = values(model)
    with pytest.raises(UnclippedGradientError, match="step: no backward"):
        optimizer.step()
    optimizer.backward(data())
    optimizer.zero_grad()
    with pytest.raises(UnclippedGradientError, match="zero_grad came in between"):
        optimizer.step()
    assert_same(values(model), after)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_model_zero_grad_between_backward_and_step_forgets_nothing(set_to_none: bool) -> None:
    """The sums are the optimizer's; only its own ``zero_grad`` forgets them."""
    model = mlp()
    optimizer, before = private(model), values(model)
    optimizer.backward(data(2))
    model.zero_grad(set_to_none=set_to_none)
    optimizer.backward(data()[2:])
    model.zero_grad(set_to_none=set_to_none)
    sums, _ = clipped(model, torch.cat([data(2), data()[2:]]))
    optimizer.step()
    for name, total in sums.items():
        torch.testing.assert_close(model.get_parameter(name), before[name] - total)


POSITIONS: dict[str, tuple[Act | None, Act | None]] = {
    "never": (None, None),
    "before backward": (lambda o, m: o.zero_grad(), None),
    "after step": (None, lambda o, m: o.zero_grad()),
    "both": (lambda o, m: o.zero_grad(), lambda o, m: o.zero_grad()),
    "to zeros": (lambda o, m: o.zero_grad(set_to_none=False), None),
    "to zeros after step": (None, lambda o, m: o.zero_grad(set_to_none=False)),
    "model": (lambda o, m: m.zero_grad(), None),
    "model to zeros": (None, lambda o, m: m.zero_grad(set_to_none=False)),
}


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("calls", [1, 2])
def test_where_zero_grad_stands_does_not_matter(position: str, calls: int) -> None:
    def run(first: Act | None, last: Act | None) -> dict[str, Tensor]:
        model = mlp()
        generator = torch.Generator().manual_seed(7)
        optimizer = private(model, noise_multiplier=0.5, noise=SeededNoise(generator))
        for step in range(3):
            if first:
                first(optimizer, model)
            for call in range(calls):
                optimizer.backward(data(seed=step + 10 * call))
            optimizer.step()
            if last:
                last(optimizer, model)
        return values(model)

    assert_same(run(*POSITIONS[position]), run(None, lambda o, m: o.zero_grad()))


def test_kept_references_keep_their_values() -> None:
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0, expected_batch_size=3)
    optimizer.backward(data())
    kept, seen = list(optimizer.clipped_sums.values()), optimizer.diagnostics
    copies = [gradient.clone() for gradient in kept]
    norms, losses = seen.grad_norms, seen.losses.clone()
    assert isinstance(norms, Tensor)
    copied_norms = norms.clone()
    optimizer.step()
    noisy = grads(model)
    noisy_copies = [gradient.clone() for gradient in noisy]
    optimizer.backward(data(seed=2))
    optimizer.step()
    for one, other in zip([*kept, *noisy], [*copies, *noisy_copies], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(norms, copied_norms)
    assert torch.equal(seen.losses, losses)
    assert not torch.equal(optimizer.diagnostics.grad_norms, copied_norms)  # type: ignore[arg-type]


def test_a_loss_that_raises_leaves_the_logical_batch_as_it_was() -> None:
    model = mlp()
    fails = [False]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = squared(model, x)
        if fails[0]:
            raise KeyError("by the user")
        return value

    optimizer = private(model, loss)
    optimizer.backward(data())
    before = optimizer.clipped_sums
    fails[0] = True
    with pytest.raises(KeyError, match="by the user"):
        optimizer.backward(data(seed=2))
    assert_same(optimizer.clipped_sums, before)
    optimizer.step()


@pytest.mark.parametrize("clear", ["model.zero_grad", "grad = None", "optimizer.zero_grad"])
def test_published_gradients_are_not_kept_after_they_are_cleared(clear: str) -> None:
    """Some loops clear gradients through the model; the optimizer must not hold one more copy each step."""
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0)
    clears: dict[str, Callable[[], object]] = {
        "model.zero_grad": model.zero_grad,
        "grad = None": lambda: [setattr(p, "grad", None) for p in model.parameters()],
        "optimizer.zero_grad": optimizer.zero_grad,
    }
    published = []
    for _ in range(3):
        optimizer.backward(data())
        optimizer.step()
        published.append([weakref.ref(gradient) for gradient in grads(model)])
        clears[clear]()
    optimizer.backward(data())
    assert not any(reference() is not None for step in published for reference in step)
