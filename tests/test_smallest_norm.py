"""Tiny clipping norms and gradients: what underflow hides stays within the norm, or the norm is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import AdaptiveQuantile, Automatic, Performance, PerLayer, clipped_grad
from clipgrad.clipping._underflow import smallest_norm
from tests.dp_tools import data, mlp, private
from tests.nightly import some

Params = dict[str, Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAMPLES, POSITIONS = 6, 3
EXCESS = 1 + 1e-5
# Powers of ten of the output gradients, from all that float32 flushes to zero to squares that overflow.
SCALES = (-40, -30, -24, -21, -19, -17, -12, -9, -3, 3, 9, 15)


@contextmanager
def flushing(flush: bool) -> Iterator[None]:
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def dense(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """Uses with input and output gradient of any size: ``y`` multiplies what the layer returns."""
    return (F.linear(x, p["w"], p["b"]) * y).sum()


def normed(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return (F.layer_norm(x, (4,), p["g"], p["h"]) * y[..., :4]).sum()


def image(p: Params, x: Tensor, y: Tensor) -> Tensor:
    out = F.conv1d(x.mT, p["k"])
    return (out * y.mT[:, :2, : out.shape[2]]).sum()


def looked_up(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """An embedding tied to the output layer."""
    ids = (x[..., 0] > 0).long()
    hidden = F.embedding(ids, p["e"])
    return (F.linear(hidden, p["e"]) * y[..., :5]).sum() + (hidden * y[..., :4]).sum()


LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "dense": (dense, {"w": (6, 4), "b": (6,)}),
    "normed": (normed, {"g": (4,), "h": (4,)}),
    "image": (image, {"k": (2, 4, 2)}),
    "looked up": (looked_up, {"e": (5, 4)}),
}


def drawn(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, power: int, tilt: int
) -> tuple[Params, Tensor, Tensor]:
    """Parameters and batch; inputs are larger and output gradients smaller by a power of ten, or the reverse."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {name: normal(*shape).to(dtype) for name, shape in shapes.items()}
    x = normal(2 * SAMPLES, POSITIONS, 4) * 10.0**tilt
    y = normal(2 * SAMPLES, POSITIONS, 6) * 10.0 ** (power - tilt)
    return params, x.to(dtype), y.to(dtype)


def flat(grads: Params) -> Tensor:
    return torch.cat([total.double().flatten() for total in grads.values()])


def contributions(gradient: Any, params: Params, *rows: Tensor) -> Tensor:
    alone = [
        flat(gradient(params, *(r[i : i + 1] for r in rows)).grads) for i in range(len(rows[0]))
    ]
    return torch.stack(alone)


@pytest.mark.parametrize(
    ("name", "dtype", "strategy", "flush"),
    some(6, list(LOSSES), list(DTYPES), ["kept", "ghost"], [False, True]),
)
def test_no_sample_exceeds_the_norm(
    name: str, dtype: torch.dtype, strategy: str, flush: bool
) -> None:
    loss, shapes = LOSSES[name]
    smallest = smallest_norm([dtype]) * (1 + 1e-12)
    reached = 0.0
    for power in SCALES:
        for tilt in (0, 12):
            for norm in (smallest, 1.0, 1e6):
                with flushing(flush):
                    params, x, y = drawn(shapes, dtype, power, tilt)
                    gradient = clipped_grad(
                        loss, max_grad_norm=norm, performance=Performance(strategy=strategy)
                    )
                    if tilt == 0:
                        largest = float(
                            contributions(gradient, params, x[:3], y[:3]).norm(dim=1).max()
                        )
                        assert largest <= norm * EXCESS, (power, tilt, norm)
                        reached = max(reached, largest / norm)
                    # One sample of the batch is replaced by one a thousand times as large or small.
                    one, other = x[:SAMPLES].clone(), y[:SAMPLES].clone()
                    one[0], other[0] = x[SAMPLES], y[SAMPLES] * 1e3
                    sums = [flat(gradient(params, x[:SAMPLES], y[:SAMPLES]).grads)]
                    sums.append(flat(gradient(params, one, other).grads))
                moved = float((sums[0] - sums[1]).norm())
                # All samples together are rounded once.
                assert moved <= 2 * norm * EXCESS + SAMPLES * norm * 1e-6, (power, tilt, norm)
    assert reached > 0.999  # clipping took place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smaller_norms_are_refused(dtype: torch.dtype) -> None:
    smallest = smallest_norm([dtype])
    tiny = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
    assert smallest == 2.0**30 * math.sqrt(tiny)
    params, x, y = drawn(LOSSES["dense"][1], dtype, 0, 0)
    for norm in (smallest * 0.999, 1e-160, 5e-324):
        with pytest.raises(ValueError, match=r"max_grad_norm is .*underflow.*larger norm"):
            clipped_grad(dense, max_grad_norm=norm)(params, x, y)
    for legal in (0.0, smallest, math.inf):
        result = clipped_grad(dense, max_grad_norm=legal)(params, x, y)
        assert bool(result.grads["w"].any()) == (legal > 0)


def test_a_layer_norm_scaled_to_nothing() -> None:
    """It contributed 2e7 times the clipping norm."""

    def loss(p: Params, x: Tensor) -> Tensor:
        return (F.layer_norm(x, (8,), p["g"]) * 1e-24).sum()

    params = {"g": torch.ones(8)}
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"1e-30.*underflow"):
        clipped_grad(loss, max_grad_norm=1e-30)(params, x)
    params = {name: p.double() for name, p in params.items()}
    each = contributions(clipped_grad(loss, max_grad_norm=1e-30), params, x.double())
    torch.testing.assert_close(
        each.norm(dim=1), torch.full((3,), 1e-30, dtype=torch.float64), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"w": 1.0, "b": 1e-30}, "max_grad_norm of group 'b' is 1e-30"),
        (Automatic(1e-30), "max_grad_norm is 1e-30"),
        (PerLayer(1e-30), "max_grad_norm"),
    ],
)
def test_every_place_of_a_norm(strategy: Any, message: str) -> None:
    params, x, y = drawn(LOSSES["dense"][1], torch.float32, 0, 0)
    with pytest.raises(ValueError, match=message):
        clipped_grad(dense, max_grad_norm=strategy)(params, x, y)


def test_the_narrowest_dtype_decides() -> None:
    assert smallest_norm([torch.float64, torch.bfloat16]) == smallest_norm([torch.float32])


@pytest.mark.parametrize(
    "strategy",
    [lambda step: 10.0 ** -(12 * step), AdaptiveQuantile(1.0, target_quantile=0.01, learning_rate=60.0)],
    ids=["schedule", "adaptive"],
)  # fmt: skip
def test_a_norm_that_becomes_too_small(strategy: Any) -> None:
    model = mlp(dtype=torch.float32)
    # Gradients smaller than any norm, so that the adaptive one follows them down.
    optimizer = private(
        model,
        lambda m, x: 1e-30 * m(x).square().mean(),
        max_grad_norm=strategy,
        expected_batch_size=5,
    )
    optimizer.backward(data(dtype=torch.float32))
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"underflow.*schedule or AdaptiveQuantile chose this norm"
    ):
        optimizer.backward(data(dtype=torch.float32))


@pytest.mark.parametrize("strategy", ["kept", "ghost"])
def test_norms_that_overflow_contribute_nothing(strategy: str) -> None:
    for power in (19, 22, 30, 37):
        params, x, y = drawn(LOSSES["dense"][1], torch.float32, power, 0)
        result = clipped_grad(dense, max_grad_norm=1e6, performance=Performance(strategy=strategy))(
            params, x, y
        )
        kept = 2 * SAMPLES - int(result.num_nonfinite)
        assert float(flat(result.grads).norm()) <= kept * 1e6 * EXCESS
        assert power == 19 or kept == 0


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("shape", [(3000, 1), (1, 3000), (50, 60)])
@pytest.mark.parametrize("tiny", ["input", "output gradient"])
@pytest.mark.parametrize("strategy", ["kept", "ghost"])
def test_long_vectors_of_numbers_whose_squares_vanish(
    strategy: str, tiny: str, shape: tuple[int, int], positions: int
) -> None:
    """One factor has many elements that vanish when they are squared, the other is huge."""
    rows, columns = shape
    params = {"w": torch.zeros(shape)}
    x = torch.full((2, positions, columns), 1e15 if tiny == "output gradient" else 1e-19)
    y = torch.full((2, positions, rows), 1e-19 if tiny == "output gradient" else 1e15)

    def loss(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return (F.linear(x, p["w"]) * y).sum()

    norm = 1e-4
    with flushing(True):
        gradient = clipped_grad(
            loss, max_grad_norm=norm, performance=Performance(strategy=strategy)
        )
        each = contributions(gradient, params, x, y)
    assert float(each.norm(dim=1).max()) <= norm * EXCESS
