"""Normalisations beyond their rule cases: refusals, dtypes, layouts, and the way out of batch norm."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipgrad
from clipgrad.engine import reference
from tests.nightly import chosen

from . import oracle


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Per-sample clipped sum of a model's squared output."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).sin().sum()

    grads: dict[str, Tensor] = clipgrad.clipped_grad(loss, max_grad_norm=1.0)(params, x).grads
    return grads


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm2d(3), (3, 4, 4)),
        (nn.BatchNorm3d(3), (3, 2, 2, 2)),
        (nn.SyncBatchNorm(3), (3, 4, 4)),
        (nn.BatchNorm2d(3, affine=False), (3, 4, 4)),
    ],
)
def test_batch_norm_in_training_mode_is_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.Size(shape).numel()), 3))
    model = nn.Sequential(layer, *model)
    with pytest.raises(clipgrad.errors.NotPerSampleError) as caught:
        gradients(model, torch.randn(4, *shape))
    message = str(caught.value)
    assert "BatchNorm in training mode" in message
    assert "depends on the others" in message
    assert "clipgrad.replace_batch_norm(model)" in message
    assert "model.eval()" in message


def test_batch_norm_without_statistics_is_refused_in_eval_mode_too() -> None:
    model = nn.BatchNorm2d(3, track_running_stats=False).eval()
    with pytest.raises(
        clipgrad.errors.NotPerSampleError, match="BatchNorm without running statistics"
    ):
        gradients(model, torch.randn(4, 3, 5, 5))


def test_instance_norm_that_writes_statistics_is_refused() -> None:
    model = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(clipgrad.errors.NotPerSampleError, match=r"InstanceNorm.*buffers.*eval\(\)"):
        gradients(model, torch.randn(4, 3, 5, 5))
    assert torch.equal(model.running_mean, before["running_mean"])


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        # A batch of one sample has the very shape that would be normalised: samples must not be mixed.
        (lambda x, w: F.layer_norm(x, (4, 1, 4), w), "normalized_shape"),
        (lambda x, w: F.layer_norm(x, (5,), w), "normalized_shape"),
        (lambda x, w: F.rms_norm(x, (4, 1, 4), w), "at least 3 dimensions"),
        (lambda x, w: F.group_norm(x[..., None].expand(-1, -1, 9), 3, w[0, 0]), "divisible"),
        (lambda x, w: F.group_norm(x, 4, w[0, 0]), "more than 1 value per channel"),
        (lambda x, w: F.instance_norm(x[..., None], weight=w[0, 0]), "more than 1 spatial element"),
    ],
)
def test_the_operations_own_complaints_stay(
    norm: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    gradient = clipgrad.clipped_grad(lambda p, x: norm(x, p["w"]).sum(), max_grad_norm=1.0)
    with pytest.raises((RuntimeError, ValueError), match=message):
        gradient({"w": torch.ones(4, 1, 4)}, torch.randn(4, 4))


# ------------------------------------------------------------------ dtypes and memory layouts


def statistics(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((8,), 0.25, dtype=dtype), torch.full((8,), 1.5, dtype=dtype)


NORMS: dict[str, Callable[..., Tensor]] = {
    "layer": lambda x, w, b: F.layer_norm(x, (8,), w, b),
    "rms": lambda x, w, b: F.rms_norm(x, (8,), w),
    "group": lambda x, w, b: F.group_norm(x.mT, 2, w, b).mT,
    "instance": lambda x, w, b: F.instance_norm(x.mT, weight=w, bias=b).mT,
    "batch": lambda x, w, b: F.batch_norm(x.mT, *statistics(w.dtype), w, b).mT,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(
    norm: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    # Output gradients are the counts, which half precision holds exactly, while their sum needs 13 bits.
    torch.manual_seed(0)
    x, counts = torch.randn(3, 2048, 8).to(dtype), torch.randint(1, 8, (3, 2048, 8))
    params = {"w": torch.ones(8, dtype=dtype), "b": torch.zeros(8, dtype=dtype)}

    def loss(params: dict[str, Tensor], x: Tensor, counts: Tensor) -> Tensor:
        return (norm(x, **params).to(x.dtype).double() * counts).sum()

    result = clipgrad.clipped_grad(loss, max_grad_norm=torch.inf)(params, x, counts)
    wide = {name: p.double() for name, p in params.items()}
    _, each = reference.per_sample_gradients_by_loop(loss, wide, x.double(), counts)
    expected, _ = reference.clipped_sum(each, torch.inf)
    for name, gradient in result.grads.items():
        assert gradient.dtype == torch.float32
        # The forward's own rounding shifts no output gradient, so only float32's remains.
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-5, atol=1e-2)


# PyTorch's own remark: its RMS norm has no fused kernel for a float weight under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_autocast(norm: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    params = {"m": torch.randn(8, 8) / 3, "w": torch.rand(8) + 0.5, "b": torch.randn(8)}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            y = norm(x @ params["m"], params["w"], params["b"])
            return y.float().sin().sum()

    result = clipgrad.clipped_grad(loss, max_grad_norm=torch.inf)(params, x)
    _, each = reference.per_sample_gradients_by_loop(loss, params, x)
    for name, gradient in each.items():
        scale = gradient.sum(0).abs().max().clamp(min=1)
        torch.testing.assert_close(
            result.grads[name] / scale, gradient.sum(0) / scale, atol=0.02, rtol=0
        )


@pytest.mark.parametrize("size", [1, 5])
def test_group_norm_of_channels_last_images(size: int) -> None:
    torch.manual_seed(0)
    # The convolution gives its input gradient back: without one PyTorch's own backward crashes here.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()).double()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(size, 3, 6, 6, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = oracle.per_sample_gradients(model, lambda m, x: m(x).sin().sum(), (x,))
    sums, _ = oracle.clipped_sum(expected, 1.0)
    torch.testing.assert_close(gradients(model, x), sums, atol=1e-9, rtol=1e-9)


def test_group_norm_with_a_bias_alone() -> None:
    # PyTorch itself cannot differentiate this one, so it is compared with a weight of ones.
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    b = torch.randn(4, dtype=torch.float64)

    def loss(weight: Tensor | None) -> Callable[..., Tensor]:
        return lambda p, x: F.group_norm(x, 2, weight, p["b"]).sin().sum()

    found = clipgrad.clipped_grad(loss(None), max_grad_norm=1.0)({"b": b}, x)
    _, each = reference.per_sample_gradients_by_loop(loss(torch.ones_like(b)), {"b": b}, x)
    expected, norms = reference.clipped_sum(each, 1.0)
    torch.testing.assert_close(found.grads["b"], expected["b"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.grad_norms, norms, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", chosen(NORMS, {"batch", "rms"}))
def test_nothing_outlives_the_call(name: str) -> None:
    norm = NORMS[name]
    alive = []

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        y = norm((x * params["b"]).tanh(), params["w"], params["b"])
        alive.append(weakref.ref(y))
        return y.sin().sum()

    gc.collect()
    gc.disable()  # a cycle through autograd's graph is invisible to the collector, so there must be none
    try:
        clipgrad.clipped_grad(loss, max_grad_norm=1.0)(
            {"w": torch.ones(8), "b": torch.ones(8)}, torch.randn(3, 5, 8)
        )
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


def test_fallback_never_normalises_over_samples() -> None:
    # A weight computed from the sample declines the rule; vmap alone would mix the four samples.
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        weight = x.sum() * torch.ones(4, 1, 3, dtype=x.dtype)
        return (F.layer_norm(x, (4, 1, 3), weight) * params["w"]).sum()

    gradient = clipgrad.clipped_grad(loss, max_grad_norm=1.0)
    with pytest.raises(
        clipgrad.errors.NotPerSampleError, match=r"reaches past one sample.*\(1, 3\)"
    ):
        gradient({"w": torch.randn(3)}, torch.randn(4, 3))


def test_batch_norm_whose_gradient_lies_channels_last() -> None:
    """PyTorch's own input gradient is wrong there, a loop's too, so the measure is the formula."""
    mean, variance = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def loss(p: dict[str, Tensor], x: Tensor, by_hand: bool = False) -> Tensor:
        h = (p["w"] @ x).unsqueeze(-1)
        if by_hand:
            h = (h - mean.view(3, 1, 1)) / (variance + 1e-5).sqrt().view(3, 1, 1)
        else:
            h = F.batch_norm(h, mean, variance)
        return F.linear(h.squeeze(-1).mT, p["u"]).square().sum()

    params = {"w": torch.randn(3, 4).double(), "u": torch.randn(2, 3).double()}
    x = torch.randn(5, 4, 6).double()
    result = clipgrad.clipped_grad(loss, max_grad_norm=1e9)(params, x)
    expected = torch.func.grad(lambda p: loss(p, x, by_hand=True))(params)
    torch.testing.assert_close(result.grads, expected, rtol=1e-9, atol=1e-9)
