"""What cannot run on all samples at once in Python runs as the graph of one sample's loss, and is exact there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipgrad.compiled import eager
from clipgrad.errors import CompileMismatchError, NotPerSampleError
from tests.compiled.conftest import Graphs, graphs  # noqa: F401
from tests.dp_tools import clipped, data, mlp, private, squared
from tests.foreign_code import HOSTILE, Hostile, Params, _NoRule, _OwnRule
from tests.nightly import every, some
from tests.test_foreign_code import batch, clipped_sum

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*non-full backward hook"),
]


class OldStyle(torch.autograd.Function):
    """Its gradient depends on the whole output gradient, and is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * grad / grad.norm() + x


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "an old autograd.Function": lambda m, x: squared(m[2], OldStyle.apply(m[:2](x))),
    "a function with a rule of its own": lambda m, x: squared(m[2], _OwnRule.apply(m[:2](x))),
    "a function on a parameter": lambda m, x: F.linear(m[:2](x), OldStyle.apply(m[2].weight)).square().sum(),
    "a checkpoint": lambda m, x: m[2](checkpoint(m[:2], x, use_reentrant=False)).square().sum(),
    "a reentrant checkpoint": lambda m, x: squared(m[2], checkpoint(m[1], m[0](x), use_reentrant=True)),
    "NumPy": lambda m, x: squared(m, torch.from_numpy(x.numpy() * 2)),
    "the values of a hidden layer": lambda m, x: squared(m, x * torch.from_numpy(m(x).detach().numpy()).sum()),
    "a layer that is compiled": lambda m, x: squared(torch.compile(m, backend="aot_eager"), x),
}  # fmt: skip


@pytest.mark.parametrize(("name", "compile"), some(3, list(LOSSES), [False, True]))
def test_equals_the_loop(name: str, compile: bool, graphs: Graphs) -> None:  # noqa: F811
    loss, model = LOSSES[name], mlp()
    optimizer = private(model, loss, compile=compile, microbatch_size=3)
    for seed in (1, 2):
        optimizer.backward(data(6, seed=seed))
        sums = optimizer.clipped_sums
        expected = clipped(model, data(6, seed=seed), loss=loss)[0]
        torch.testing.assert_close(sums, expected, rtol=0, atol=1e-9)
        optimizer.step()


def test_a_compiled_step_is_compared_with_the_users_python(
    graphs: Graphs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attribute that appears on a function is a change that PyTorch's guards do not see."""

    def other() -> None: ...

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return squared(m, OldStyle.apply(x)) * getattr(other, "beta", 1.0)  # type: ignore[no-any-return, no-untyped-call]

    model, compared = mlp(), []
    optimizer = private(model, loss, compile=True)

    def counted(*args: Any) -> Any:
        compared.append(args)
        return run_sample_loop(*args)

    run_sample_loop = eager.run_sample_loop
    monkeypatch.setattr(eager, "run_sample_loop", counted)
    optimizer.backward(data())
    other.beta = 2.0  # type: ignore[attr-defined]
    optimizer.step()
    with pytest.raises(CompileMismatchError, match="PyTorch's guards do not see"):
        optimizer.backward(data(seed=2))
    assert compared


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_that_would_lose_gradients() -> None:
    """PyTorch warns and gives the parameters inside no gradient if no input requires grad."""

    def loss(m: nn.Sequential, x: Tensor) -> Tensor:
        return m[2](checkpoint(m[0], x, use_reentrant=True)).square().sum()  # type: ignore[no-any-return]

    with pytest.raises(NotPerSampleError, match=r"torch\.utils\.checkpoint"):
        private(mlp(), loss).backward(data())


AT_HAND = {name for name in HOSTILE if HOSTILE[name].message is not None}
AT_HAND -= {name for name in HOSTILE if name.startswith(("batch", "parameter"))}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", every(3, sorted(AT_HAND)))
def test_a_second_fault_is_still_refused(name: str) -> None:
    """Python stops at the first, which the graph can do; the second must not slip into the graph."""
    hostile = HOSTILE[name]

    def loss(p: Params, x: Tensor) -> Tensor:
        through = {key: _NoRule.apply(value) for key, value in p.items()}  # type: ignore[no-untyped-call]
        return hostile.loss(through, x)

    with pytest.raises(NotPerSampleError):
        clipped_sum(Hostile(loss, hostile.message, hostile.around), batch())
