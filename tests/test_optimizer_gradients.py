"""Who may write to .grad: the optimizer alone. What others write is refused, or never reaches a step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, UnclippedGradientError
from tests.dp_tools import assert_same, clipped, data, mlp, private, squared, trained, values

Act = Callable[[DPOptimizer, nn.Sequential], object]


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in trained(model).values()]
    assert all(gradient is not None for gradient in found)
    return found  # type: ignore[return-value]


def backward_by_hand(_: DPOptimizer, model: nn.Sequential) -> None:
    squared(model, data()).backward()


def replace(_: DPOptimizer, model: nn.Sequential) -> None:
    model[0].weight.grad = model[0].weight.grad.clone()


def scale_in_place(_: DPOptimizer, model: nn.Sequential) -> None:
    model[2].bias.grad.mul_(2.0)


def write_through_a_view(_: DPOptimizer, model: nn.Sequential) -> None:
    model[0].weight.grad[0, 0] = 7.0


def clip_again(_: DPOptimizer, model: nn.Sequential) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clip_value(_: DPOptimizer, model: nn.Sequential) -> None:
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def clear_one(_: DPOptimizer, model: nn.Sequential) -> None:
    model[0].bias.grad = None


FOREIGN: list[Act] = [
    backward_by_hand,
    replace,
    scale_in_place,
    write_through_a_view,
    clip_again,
    clip_value,
    clear_one,
]


@pytest.mark.parametrize("act", FOREIGN)
def test_a_step_on_foreign_gradients_is_refused(act: Act) -> None:
    model = mlp()
    optimizer, before = private(model, noise_multiplier=1.0), values(model)
    optimizer.backward(data())
    act(optimizer, model)
    with pytest.raises(UnclippedGradientError, match=r"'[02]\.(weight|bias)'.*by somebody else"):
        optimizer.step()
    assert_same(values(model), before)
    with pytest.raises(UnclippedGradientError, match=r"only DPOptimizer\.backward.*zero_grad\(\)"):
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
    for name, total in clipped(model, data())[0].items():
        torch.testing.assert_close(model.get_parameter(name).grad, total)


def by_data(gradient: Tensor) -> None:
    # Tensor.data shares memory, but not the version counter that tells of a write.
    gradient.data.mul_(1000.0)


def by_numpy(gradient: Tensor) -> None:
    gradient.numpy()[...] = 1000.0


def by_address(gradient: Tensor) -> None:
    ctypes.memset(gradient.data_ptr(), 65, 4 * gradient.numel())


def by_storage(gradient: Tensor) -> None:
    gradient.untyped_storage().fill_(65)


def by_a_tensor_on_its_storage(gradient: Tensor) -> None:
    torch.empty(0).set_(gradient.untyped_storage()).fill_(1000.0)


def by_many_at_once(gradient: Tensor) -> None:
    torch._foreach_mul_([gradient.data], 1000.0)


def by_a_scaler(gradient: Tensor) -> None:
    # GradScaler.unscale_: it leaves no version.
    scale, found = torch.tensor(1000.0), torch.zeros(1)
    scale, found = scale.to(gradient.device), found.to(gradient.device)
    torch._amp_foreach_non_finite_check_and_unscale_([gradient], found, scale)


def by_another_library(gradient: Tensor) -> None:
    np.from_dlpack(gradient)  # read only, if it is at all
    torch.from_dlpack(gradient.detach()).mul_(1000.0)


@pytest.mark.parametrize(
    "write",
    [
        by_data,
        by_numpy,
        by_address,
        by_storage,
        by_a_tensor_on_its_storage,
        by_many_at_once,
        by_a_scaler,
        by_another_library,
    ],
)
@pytest.mark.parametrize("calls", [1, 2])
def test_writes_that_leave_no_trace_do_not_reach_the_step(
    write: Callable[[Tensor], None], calls: int
) -> None:
    model = mlp()
    sums, _ = clipped(model, data())
    optimizer, before = private(model), values(model)
    for _ in range(calls):
        optimizer.backward(data())
        for gradient in grads(model):
            try:
                write(gradient)
            except (RuntimeError, BufferError, TypeError):
                pytest.skip("PyTorch refuses to write in this way")
    optimizer.step()
    for name, total in sums.items():
        torch.testing.assert_close(model.get_parameter(name), before[name] - calls * total)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("write", [by_data, by_many_at_once, by_a_scaler])
def test_nor_on_a_gpu(write: Callable[[Tensor], None]) -> None:
    """Its kernels for many tensors write to addresses that they asked for as if to read."""
    model = mlp().cuda()
    sums, _ = clipped(model, data().cuda())
    optimizer, before = private(model), values(model)
    optimizer.backward(data().cuda())
    for gradient in grads(model):
        write(gradient)
    optimizer.step()
    for name, total in sums.items():
        torch.testing.assert_close(model.get_parameter(name), before[name] - total)


def test_showing_the_sums_copies_nothing() -> None:
    """Neither what ``.grad`` shows before the step, nor what is noised in it."""
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0)
    optimizer.backward(data())
    assert optimizer._pending._sums is not None
    addresses = [address_only_read(total) for total in optimizer._pending._sums]
    assert [address_only_read(gradient) for gradient in grads(model)] == addresses
    optimizer.step()
    assert [address_only_read(gradient) for gradient in grads(model)] == addresses


def address_only_read(tensor: Tensor) -> int:
    """``data_ptr`` is for writing."""
    address: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]
    return address


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


def test_model_zero_grad_between_backward_and_step() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    model.zero_grad()
    with pytest.raises(UnclippedGradientError, match=r"cleared.*model\.zero_grad\(\)"):
        optimizer.step()


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
        optimizer = private(model, noise_multiplier=0.5, generator=generator)
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


def test_model_zero_grad_between_backward_calls_starts_anew() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data(seed=2))
    model.zero_grad()
    optimizer.backward(data())
    for name, total in clipped(model, data())[0].items():
        torch.testing.assert_close(model.get_parameter(name).grad, total)


def test_kept_references_keep_their_values() -> None:
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0, expected_batch_size=3)
    optimizer.backward(data())
    kept, seen = grads(model), optimizer.diagnostics
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
    before = [gradient.clone() for gradient in grads(model)]
    fails[0] = True
    with pytest.raises(KeyError, match="by the user"):
        optimizer.backward(data(seed=2))
    assert all(torch.equal(one, other) for one, other in zip(grads(model), before, strict=True))
    optimizer.step()
