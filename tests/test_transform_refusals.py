"""Losses that no per-sample gradient can be given for, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipgrad import Performance, clipped_grad
from clipgrad.engine.reference import Params
from clipgrad.errors import EscapedParameterError, NotPerSampleError
from tests.small_mlp import STRATEGIES, B, close, definition, draw

Loss = Callable[[Params, Tensor], Any]
SHARED = torch.zeros(3, dtype=torch.float64)


@pytest.fixture
def params() -> Params:
    torch.manual_seed(0)
    return {"w": draw(3, 3), "b": draw(3)}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return draw(B, 3)


def linear(p: Params, x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"])


def writes_to_the_outside(p: Params, x: Tensor) -> Tensor:
    SHARED.add_(linear(p, x)[0].detach())
    return linear(p, x).sum()


def writes_to_an_expression(p: Params, x: Tensor) -> Tensor:
    weight = p["w"].clone()
    weight.mul_(2)
    return F.linear(x, weight).sum()


def writes_to_a_parameter(p: Params, x: Tensor) -> Tensor:
    p["w"].add_(1)
    return linear(p, x).sum()


def relu_of_an_expression(p: Params, x: Tensor) -> Tensor:
    """The first use saw the weight before it was overwritten; a gradient through one graph cannot fit both."""
    weight = p["w"] * 2
    before = F.linear(x, weight)
    F.relu(weight, inplace=True)
    return (before * F.linear(x, weight)).sum()


def writes_to_an_input_of_a_rule(p: Params, x: Tensor) -> Tensor:
    h = linear(p, x)
    y = F.linear(h, p["w"])
    h.mul_(2)
    return (y * h).sum()


def strides_over_shared_memory(p: Params, x: Tensor) -> Tensor:
    """PyTorch's gradient of as_strided divides by the number of samples here, and gives all the same."""
    rows = F.embedding(torch.arange(3), p["w"])
    return (x @ rows.as_strided((3, 3), (1, 3))).square().sum()


def strides_over_shared_memory_in_a_transform(p: Params, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row @ p["w"].as_strided((3, 3), (1, 3)))(x).square().sum()


def copies_strides_over_shared_memory(p: Params, x: Tensor) -> Tensor:
    return (x @ torch.as_strided_copy(p["w"], (3, 3), (1, 3))).square().sum()


def strides_by_another_name(p: Params, x: Tensor) -> Tensor:
    return (x @ torch.ops.aten.as_strided(p["w"], (3, 3), (1, 3))).square().sum()


def strides_by_an_overload(p: Params, x: Tensor) -> Tensor:
    return (x @ torch.ops.aten.as_strided.default(p["w"], (3, 3), (1, 3))).square().sum()


def strides_in_place(p: Params, x: Tensor) -> Tensor:
    return (x @ (p["w"] * x.sum()).as_strided_((3, 3), (1, 3))).square().sum()


def writes_to_ids(p: Params, x: Tensor) -> Tensor:
    ids = x.argmax(-1)
    rows = F.embedding(ids, p["w"])
    ids.zero_()
    return (rows * x).sum()


def renormalises(p: Params, x: Tensor) -> Tensor:
    return F.embedding(x.argmax(-1), p["w"], max_norm=1.0).sum()


def asks_for_grad(p: Params, x: Tensor) -> Tensor:
    return torch.autograd.grad(linear(p, x.requires_grad_()).sum(), x)[0].sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (linear, r"must return a scalar tensor for one sample, got a tensor of shape \(1, 3\)"),
        (lambda p, x: 1.0, "must return a scalar tensor for one sample, got float"),
        (lambda p, x: (linear(p, x).sum(), x), "got tuple.*has_aux=True"),
        (lambda p, x: linear(p, x).argmax(), "must be a floating-point scalar, got torch.int64"),
        (lambda p, x: x.sum(), "does not depend on any parameter"),
        (lambda p, x: F.linear(x, p["w"].detach()).sum(), "does not depend on any parameter"),
        (lambda p, x: linear(p, x).sum() * (1.0 if x.sum() > 0 else 2.0), r"torch\.where"),
        (lambda p, x: linear(p, x).sum() * x.sum().item(), r"\.item\(\)"),
        (lambda p, x: linear(p, x)[x > 0].sum(), "shape depends on the data"),
        (writes_to_the_outside, "in place into a tensor that all samples share"),
        (writes_to_an_expression, r"wrote to parameter .* in place|computed from parameters alone"),
        (writes_to_a_parameter, "wrote to parameter 'w' in place|writes in place to a parameter"),
        (relu_of_an_expression, "computed from parameters alone"),
        (writes_to_an_input_of_a_rule, "an input of linear was changed by an in-place operation"),
        (strides_over_shared_memory, "as_strided is applied to a value that all samples share"),
        (strides_over_shared_memory_in_a_transform, "as_strided is applied to a value"),
        (copies_strides_over_shared_memory, "as_strided is applied to a value"),
        (strides_by_another_name, "as_strided is applied to a value"),
        (strides_by_an_overload, "as_strided is applied to a value"),
        (strides_in_place, "as_strided_ changes the strides of a tensor in place"),
        (writes_to_ids, "an input of embedding was changed by an in-place operation"),
        (renormalises, r"max_norm=1\.0 rewrites rows"),
        (
            lambda p, x: torch.distributions.Normal(linear(p, x), 1.0).rsample().sum(),
            r"writes random numbers in place.*torch\.randn_like\(mean\)",
        ),
        (asks_for_grad, r"differentiates with requires_grad_\(\).*Use torch\.func\.grad"),
    ],
)
def test_refused(params: Params, x: Tensor, loss: Loss, message: str) -> None:
    with pytest.raises(NotPerSampleError, match=message):
        clipped_grad(loss, max_grad_norm=1.0)(params, x)


def test_random_loss_that_must_not_be(params: Params, x: Tensor) -> None:
    def loss(p: Params, x: Tensor) -> Tensor:
        return F.dropout(linear(p, x), 0.5).sum()

    with pytest.raises(
        NotPerSampleError, match='the loss is random, and randomness="error" forbids'
    ):
        clipped_grad(loss, max_grad_norm=1.0, performance=Performance(randomness="error"))(
            params, x
        )


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (None, "aux may hold tensors only, got NoneType"),
        ({"a": 1}, "aux may hold tensors only, got int"),
    ],
)
def test_aux_that_is_none(params: Params, x: Tensor, aux: Any, message: str) -> None:
    with pytest.raises(NotPerSampleError, match=message):
        clipped_grad(lambda p, x: (linear(p, x).sum(), aux), max_grad_norm=1.0, has_aux=True)(
            params, x
        )
    with pytest.raises(
        NotPerSampleError, match=r"needs the loss to return \(loss, aux\), got Tensor"
    ):
        clipped_grad(lambda p, x: linear(p, x).sum(), max_grad_norm=1.0, has_aux=True)(params, x)


# ------------------------------------------------------------------ gradients that would escape


class Square(torch.autograd.Function):
    """Holds its weight where no operation shows it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient * weight**2, 2 * gradient * x * weight


@pytest.mark.parametrize(
    ("use", "reached"),
    [
        (lambda w, x: F.linear(x, w), "linear"),
        (lambda w, x: x @ w, "matmul"),
        (lambda w, x: x * w[0], "Tensor.__getitem__"),
        (lambda w, x: F.embedding(x.argmax(-1), w), "embedding"),
        (lambda w, x: torch.cat([w, x]), "(cat|the loss)"),
        # No operation shows these; the graph that they leave behind does.
        (lambda w, x: Square.apply(x, w), "the loss"),
    ],
)
def test_parameter_by_another_road(
    params: Params, x: Tensor, use: Callable[[Tensor, Tensor], Tensor], reached: str
) -> None:
    outside = params["w"].requires_grad_()
    gradient = clipped_grad(
        lambda p, x: (linear(p, x) * use(outside, x)[0]).sum(), max_grad_norm=1.0
    )
    message = rf"parameter 'w' reached {reached} from outside the transform"
    with pytest.raises(EscapedParameterError, match=message):
        gradient(params, x)
    assert outside.grad is None


def test_foreign_tensor_that_requires_grad(params: Params, x: Tensor) -> None:
    other = draw(3).requires_grad_()
    gradient = clipped_grad(lambda p, x: (linear(p, x) * other).sum(), max_grad_norm=1.0)
    with pytest.raises(EscapedParameterError, match=r"a tensor of shape \(3,\) that requires grad"):
        gradient(params, x)
    assert other.grad is None


def test_constant_from_outside(params: Params, x: Tensor) -> None:
    """A detached original is a constant, and a frozen weight is none of the transform's business."""
    outside, frozen = params["w"].requires_grad_(), draw(3, 3)

    def loss(p: Params, x: Tensor) -> Tensor:
        return (linear(p, x) * (outside.detach() @ frozen)[0] * outside.shape[0]).sum()

    result = clipped_grad(loss, max_grad_norm=1.0)(params, x)
    close(result.grads, definition(params, x, norm=1.0, fn=loss)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_custom_function_of_a_parameter(params: Params, x: Tensor, strategy: str) -> None:
    """The plan does not see this use of the weight; its gradient counts all the same."""

    def loss(p: Params, x: Tensor) -> Tensor:
        return (Square.apply(x, p["b"]) + Square.apply(x, p["w"]) + linear(p, x)).square().sum()

    result = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))(
        params, x
    )
    close(result.grads, definition(params, x, norm=1.0, fn=loss)[0])


def test_a_failure_leaves_nothing_behind(params: Params, x: Tensor) -> None:
    def fails(p: Params, x: Tensor) -> Tensor:
        linear(p, x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        clipped_grad(fails, max_grad_norm=1.0)(params, x)
    loss = lambda p, x: linear(p, x).square().sum()  # noqa: E731
    close(
        clipped_grad(loss, max_grad_norm=1.0)(params, x).grads,
        definition(params, x, norm=1.0, fn=loss)[0],
    )


@pytest.mark.parametrize("part", [lambda w: w.chunk(3)[0], lambda w: w.split(1)[1]])
def test_a_checkpoint_that_takes_a_parameter_apart(part: Callable[[Tensor], Any]) -> None:
    """It fails in another place than a checkpoint that only reads it, and runs as a graph like that one."""

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return checkpoint(lambda h: F.linear(h, part(w)).tanh(), x, use_reentrant=False).sum()

    def plain(w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, part(w)).tanh().sum()

    w, x = torch.ones(3, 1), torch.arange(1.0, 3.0)[:, None]
    found = clipped_grad(loss, max_grad_norm=0.3)(w, x)
    expected = clipped_grad(plain, max_grad_norm=0.3)(w, x)
    close(found.grads, expected.grads)
    close(found.grad_norms, expected.grad_norms)


@pytest.mark.parametrize("sees", ["a list", "nothing"])
def test_writes_to_the_callers_own_parameter(sees: str) -> None:
    """The version of the caller's tensor tells, also where no mode sees the operation."""
    params, x = {"w": torch.randn(3, 3)}, torch.randn(2, 3)

    def loss(p: Params, x: Tensor) -> Tensor:
        with torch.no_grad():
            if sees == "a list":
                torch._foreach_mul_([params["w"]], 2.0)
            else:
                with torch._C.DisableTorchFunction():
                    params["w"].mul_(2.0)
        return (x @ p["w"]).square().sum()

    with pytest.raises(NotPerSampleError, match="wrote to parameter 'w' in place"):
        clipped_grad(loss, max_grad_norm=1.0)(params, x)
