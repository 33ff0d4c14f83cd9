"""``branches="split"``: every sample takes the branch that it would take alone, exactly."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.errors import NotPerSampleError

Params = dict[str, Tensor]
Loss = Callable[..., Any]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def params() -> Params:
    torch.manual_seed(0)
    return {"w": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, 4, dtype=torch.float64)


def linear(params: Params, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, params["w"], params["b"])


def branch(params: Params, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return linear(params, x).sin().sum()
    return linear(params, x).square().mean()


def nested(params: Params, x: Tensor) -> Tensor:
    y = linear(params, x)
    if x[0, 0] > 0:
        y = y * 2 if (y > 0).all() else y.cos()
    return y.sum() if bool(y.sum() > 0) else y.square().sum()


def item(params: Params, x: Tensor) -> Tensor:
    return linear(params, x).sin().sum() * x.sum().item() + int(x[0, 0] > 0)


def steps(params: Params, x: Tensor) -> Tensor:
    y = x
    for _ in range(int(x.abs().sum())):
        y = y * 0.9
    return linear(params, y).sin().sum()


def contains(params: Params, x: Tensor) -> Tensor:
    y = linear(params, x).sin().sum()
    return 3 * y if 1 in (x > 1).long() else y


LOSSES = [branch, nested, item, steps, contains]


def by_loop(params: Params, loss: Loss, x: Tensor, bound: float) -> tuple[Params, Tensor, Tensor]:
    """Clipped sums, norms and losses, one sample at a time."""
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    norms, values = [], []
    for i in range(len(x)):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        value = loss(leaves, x[i : i + 1])
        found = torch.autograd.grad(value, list(leaves.values()))
        norm = torch.cat([g.flatten() for g in found]).norm()
        for name, g in zip(leaves, found, strict=True):
            sums[name] += g * min(1.0, bound / float(norm))
        norms.append(norm)
        values.append(value.detach())
    return sums, torch.stack(norms), torch.stack(values)


@pytest.mark.parametrize("microbatch_size", [None, 3, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_loop(params: Params, x: Tensor, loss: Loss, microbatch_size: int | None) -> None:
    bound = float(by_loop(params, loss, x, 1.0)[1].median())
    sums, norms, values = by_loop(params, loss, x, bound)
    gradient = clipped_grad(
        loss,
        max_grad_norm=bound,
        performance=Performance(branches="split"),
        microbatch_size=microbatch_size,
    )
    result = gradient(params, x)
    torch.testing.assert_close(result.values, values, **TOLERANCE)
    torch.testing.assert_close(result.grad_norms, norms, **TOLERANCE)
    for name in params:
        torch.testing.assert_close(result.grads[name], sums[name], **TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES)
def test_refused_by_default(params: Params, x: Tensor, loss: Loss) -> None:
    with pytest.raises(NotPerSampleError, match="branches='split'"):
        clipped_grad(loss, max_grad_norm=1.0)(params, x)


def test_padding_and_aux_keep_their_places(params: Params, x: Tensor) -> None:
    def loss(params: Params, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return branch(params, x), {"first": x[0, 0]}

    padding = torch.tensor([False, True, False, False, True, False, False])
    gradient = clipped_grad(
        loss, max_grad_norm=0.5, has_aux=True, performance=Performance(branches="split")
    )
    result = gradient(params, x, is_padding=padding)
    sums, _, _ = by_loop(params, branch, x[~padding], 0.5)
    torch.testing.assert_close(result.grads["w"], sums["w"], **TOLERANCE)
    assert torch.equal(result.aux["first"], x[:, 0])
    assert result.batch_size == 5


def test_a_bad_sample_contributes_nothing(params: Params, x: Tensor) -> None:
    bad = x.clone()
    bad[2] = float("nan")
    result = clipped_grad(branch, max_grad_norm=0.5, performance=Performance(branches="split"))(
        params, bad
    )
    sums, _, _ = by_loop(params, branch, torch.cat([x[:2], x[3:]]), 0.5)
    torch.testing.assert_close(result.grads["w"], sums["w"], **TOLERANCE)
    assert int(result.num_nonfinite) == 1


def test_agreeing_samples_take_one_pass(params: Params, x: Tensor) -> None:
    calls = []

    def loss(params: Params, x: Tensor) -> Tensor:
        calls.append(1)
        return branch(params, x.abs())

    clipped_grad(loss, max_grad_norm=1.0, performance=Performance(branches="split"))(params, x)
    assert len(calls) == 1


def written_whole(params: Params, x: Tensor) -> Tensor:
    x.mul_(2.0)
    return branch(params, x)


def written_view(params: Params, x: Tensor) -> Tensor:
    x.view(-1, 4).sub_(1.0)
    y = linear(params, x).sin().sum()
    return 3 * y if (x > 0).any() else y


def written_later(params: Params, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x += 1
    y = linear(params, x.div_(3)).sum()
    return y.cos() if y > 0 else y.square()


@pytest.mark.parametrize("microbatch_size", [None, 3, 1])
@pytest.mark.parametrize("loss", [written_whole, written_view, written_later])
def test_a_batch_that_the_loss_writes_to(
    params: Params, x: Tensor, loss: Loss, microbatch_size: int | None
) -> None:
    left = x.clone()
    sums, norms, values = by_loop(params, loss, left, 0.5)
    gradient = clipped_grad(
        loss,
        max_grad_norm=0.5,
        performance=Performance(branches="split"),
        microbatch_size=microbatch_size,
    )
    given = x.clone()
    result = gradient(params, given)
    torch.testing.assert_close(result.values, values, **TOLERANCE)
    torch.testing.assert_close(result.grad_norms, norms, **TOLERANCE)
    for name in params:
        torch.testing.assert_close(result.grads[name], sums[name], **TOLERANCE)
    torch.testing.assert_close(given, left, **TOLERANCE)  # as ordinary PyTorch leaves it


def test_a_write_to_memory_that_two_arguments_share_is_refused(params: Params, x: Tensor) -> None:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return branch(params, x.mul_(2.0)) + y.sum()

    gradient, given = (
        clipped_grad(loss, max_grad_norm=0.5, performance=Performance(branches="split")),
        x.clone(),
    )
    with pytest.raises(NotPerSampleError, match=r"share.*x\.mul\(2\.0\).*clone"):
        gradient(params, given, given)
    assert torch.equal(given, x)
    gradient(params, given, given.clone())


def test_explain_tells_of_the_first_branch(params: Params, x: Tensor) -> None:
    table = clipped_grad(
        branch, max_grad_norm=1.0, performance=Performance(branches="split")
    ).explain(params, x)
    assert [row.by for row in table.rows] == ["linear", "linear"]
    assert table.microbatch_size < len(x)


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"branches must be one of 'refuse', 'split', got 'guess'"):
        clipped_grad(branch, max_grad_norm=1.0, performance=Performance(branches="guess"))


# ------------------------------------------------------------------------------------- random numbers


def draws_before_it_asks(params: Params, x: Tensor) -> Tensor:
    kept = torch.rand_like(x[..., 0]) < x[..., 0]
    return linear(params, x).sum() * (1.0 if kept.all() else 3.0)


def drops_before_it_asks(params: Params, x: Tensor) -> Tensor:
    h = torch.nn.functional.dropout(x, 0.5)
    return linear(params, h).sum() * (1.0 if h.abs().sum() > 0 else 3.0)


def pythons(params: Params, x: Tensor) -> Tensor:
    level = random.random()
    return linear(params, x).sum() * (1.0 if x[0, 0] > level else 3.0)


def numpys(params: Params, x: Tensor) -> Tensor:
    level = float(np.random.rand())  # noqa: NPY002
    return linear(params, x).sum() * (1.0 if x[0, 0] > level else 3.0)


def draws_into_a_part(params: Params, x: Tensor) -> Tensor:
    level = torch.zeros_like(x)
    level[..., :2].uniform_(-0.5, 0.5)
    return linear(params, x).sum() * (1.0 if level.sum() < x.sum() else 3.0)


def draws_unseen(params: Params, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        level = torch.jit.script(_like)(x)
    return linear(params, x).sum() * (1.0 if (level < x).all() else 3.0)


def _like(x: Tensor) -> Tensor:
    return torch.rand_like(x)


@pytest.mark.parametrize(
    "loss",
    [
        draws_before_it_asks,
        drops_before_it_asks,
        draws_into_a_part,
        draws_unseen,
        pythons,
        numpys,
    ],
)
def test_draws_before_the_branch(params: Params, loss: Loss) -> None:
    """Drawn again for each part, a sample's mask would be one on which it agrees with its neighbours."""
    x = torch.zeros(2, 4, dtype=torch.float64)
    x[0] = 1.0 + 1e-9
    x[1] = -1.0 if loss is not drops_before_it_asks else 0.0
    gradient = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(branches="split"))
    torch.manual_seed(0)  # a mask that does not drop all of the first row
    with pytest.raises(
        NotPerSampleError, match=r"branch apart by a value that depends on random numbers"
    ):
        gradient(params, x)
    gradient(params, x[:1])


def test_a_generator_of_its_own(params: Params, x: Tensor) -> None:
    generator = torch.Generator()

    def loss(params: Params, x: Tensor) -> Tensor:
        noise = torch.rand(3, generator=generator, dtype=torch.float64)
        return linear(params, x).sum() * noise.sum() if x.sum() > 0 else params["w"].sum()

    with pytest.raises(NotPerSampleError, match="generator of the loss's own"):
        clipped_grad(loss, max_grad_norm=1.0, performance=Performance(branches="split"))(params, x)


def test_draws_before_another_question(params: Params, x: Tensor) -> None:
    """As BERT does: dropout of what it looked up, then a question about the mask."""

    def loss(params: Params, x: Tensor) -> Tensor:
        h = torch.nn.functional.dropout(linear(params, x), 0.5)
        return h.sum() * (1.0 if x.sum() > 0 else 3.0) + 0 * params["w"].sum()

    assert (x.sum(1) > 0).unique().numel() == 2
    gradient = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(branches="split"))
    drawn = torch.stack([gradient(params, x).grad_norms for _ in range(30)])
    assert all(len(norms.unique()) > 2 for norms in drawn.T)


def test_draws_after_the_branch(params: Params, x: Tensor) -> None:
    def loss(params: Params, x: Tensor) -> Tensor:
        h = x * 2 if x.sum() > 0 else x.cos()
        return linear(params, torch.nn.functional.dropout(h, 0.5)).square().sum()

    norms = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(branches="split"))(
        params, x
    ).grad_norms
    assert len(norms.unique()) == len(x)
