"""What clipped_grad returns, for losses of all kinds, against the definition."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, Relation, clipped_grad
from clipgrad import batch as batch_module
from clipgrad.engine.microbatch import run
from clipgrad.engine.reference import Params, per_sample_gradients_by_loop
from tests.small_mlp import (
    INPUTS,
    STRATEGIES,
    B,
    assert_same,
    close,
    definition,
    draw,
    median_norm,
    mlp,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_in_the_result(params: Params, batch: Any, strategy: str) -> None:
    norm = median_norm(params, *batch)
    result = clipped_grad(mlp, max_grad_norm=norm, performance=Performance(strategy=strategy))(
        params, *batch
    )
    sums, norms = definition(params, *batch, norm=norm)
    close(result.grads, sums)
    close(result.grad_norms, norms)
    close(result.values, per_sample_gradients_by_loop(mlp, params, *batch)[0])
    assert (result.batch_size, int(result.num_nonfinite), result.aux) == (B, 0, None)
    assert int(result.num_clipped) == int((norms > norm).sum()) == B // 2
    assert not any(
        g.requires_grad for g in (*result.grads.values(), result.values, result.grad_norms)
    )


def test_result_and_configuration_are_frozen(params: Params, batch: Any) -> None:
    gradient = clipped_grad(mlp, max_grad_norm=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        gradient.max_grad_norm = 2.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        gradient(params, *batch).grads = None  # type: ignore[misc]


def test_nothing_is_written(params: Params, batch: Any) -> None:
    """Not to the arguments, not to .grad, and not to the result of an earlier call."""
    for p in params.values():
        p.requires_grad_()
    before = {name: p.detach().clone() for name, p in params.items()}
    copies = [leaf.clone() for leaf in batch]
    gradient = clipped_grad(mlp, max_grad_norm=1.0, microbatch_size=2)
    first = gradient(params, *batch)
    kept = {name: g.clone() for name, g in first.grads.items()}
    second = gradient(params, draw(B, INPUTS), batch[1])
    close(dict(first.grads), kept, rtol=0, atol=0)
    assert all(p.grad is None for p in params.values())
    close({name: p.detach() for name, p in params.items()}, before, rtol=0, atol=0)
    close(list(batch), copies, rtol=0, atol=0)
    for g in second.grads.values():
        g.fill_(7)
    close(gradient(params, *batch).grads, kept, rtol=0, atol=0)


def test_under_no_grad(params: Params, batch: Any) -> None:
    gradient = clipped_grad(mlp, max_grad_norm=1.0)
    expected = gradient(params, *batch).grads
    with torch.no_grad():
        close(gradient(params, *batch).grads, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 100])
def test_microbatches(params: Params, batch: Any, size: int, strategy: str) -> None:
    options: dict[str, Any] = {
        "max_grad_norm": median_norm(params, *batch),
        "performance": Performance(strategy=strategy),
    }
    whole = clipped_grad(mlp, **options)(params, *batch)
    pieces = clipped_grad(mlp, microbatch_size=size, **options)(params, *batch)
    assert_same(pieces, whole)


def dropout(p: Params, x: Tensor) -> Tensor:
    return (F.dropout(x, 0.5) * p["w"]).sum()


def test_sums_do_not_pile_up_over_microbatches(
    params: Params, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory follows the microbatch: one sum so far, not one for every microbatch."""
    sums: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched(*args: Any) -> Any:
        alive.append(sum(ref() is not None for ref in sums))
        piece = run(*args)
        sums.extend(weakref.ref(total) for total in piece.sums)
        return piece

    monkeypatch.setattr(batch_module, "run", watched)
    clipped_grad(mlp, max_grad_norm=1.0, microbatch_size=1)(params, *batch)
    assert len(alive) == B
    assert set(alive[1:]) == {len(params)}


def test_each_sample_has_its_own_dropout_mask() -> None:
    gradient = clipped_grad(dropout, max_grad_norm=math.inf, has_aux=False)
    p, x = {"w": draw(50)}, torch.ones(2, 50, dtype=torch.float64)
    different = gradient(p, x)
    assert different.values[0] != different.values[1]
    assert set(different.grads["w"].unique().tolist()) == {0.0, 2.0, 4.0}
    same = clipped_grad(
        dropout, max_grad_norm=math.inf, performance=Performance(randomness="same")
    )(p, x)
    assert same.values[0] == same.values[1]
    assert set(same.grads["w"].unique().tolist()) == {0.0, 4.0}


def test_seeded_randomness_repeats() -> None:
    p, x = {"w": draw(50)}, torch.ones(4, 50, dtype=torch.float64)
    gradient = clipped_grad(dropout, max_grad_norm=1.0)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(gradient(p, x))
    assert_same(results[0], results[1])


def test_parameters_the_loss_does_not_use(params: Params, batch: Any) -> None:
    params["unused"] = draw(3, 2)
    for microbatch in (None, 4):
        result = clipped_grad(mlp, max_grad_norm=0.5, microbatch_size=microbatch)(params, *batch)
        assert torch.equal(result.grads["unused"], torch.zeros(3, 2, dtype=torch.float64))
        close(result.grads, definition(params, *batch, norm=0.5)[0])


def test_loss_of_parameters_alone() -> None:
    """A penalty: every sample has the same gradient, and it counts in every norm."""
    p, x = {"w": draw(3, 2)}, draw(B, 2)

    def penalty(p: Params, x: Tensor) -> Tensor:
        return p["w"].square().sum()

    def penalised(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).square().sum() + 0.1 * p["w"].square().sum()

    for fn in (penalty, penalised):
        for strategy in STRATEGIES:
            result = clipped_grad(
                fn, max_grad_norm=1.0, performance=Performance(strategy=strategy)
            )(p, x)
            close(result.grads, definition(p, x, norm=1.0, fn=fn)[0])


# Forward mode loads its formulas with TorchScript on first use.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_derivatives_inside_the_loss() -> None:
    """A gradient penalty and an inner gradient step: both differentiate through the parameters."""
    p, x = {"w": draw(3, 3)}, draw(B, 3)

    def through_the_input(p: Params, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda z: F.linear(z, p["w"]).tanh().sum())(x)
        return (slope.norm() - 1) ** 2 + F.linear(x, p["w"]).sum()

    def inner_step(p: Params, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda w: F.linear(x, w).tanh().square().sum())(p["w"])
        return F.linear(x, p["w"] - 0.1 * slope).square().sum()

    def directional(p: Params, x: Tensor) -> Tensor:
        slope = torch.func.jvp(lambda z: F.linear(z, p["w"]).tanh(), (x,), (torch.ones_like(x),))[1]
        return slope.square().sum()

    def mapped(p: Params, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda z: F.linear(z, p["w"]).tanh().square().sum())(x).sum()

    for fn in (through_the_input, inner_step, directional, mapped):
        result = clipped_grad(fn, max_grad_norm=1.0)(p, x)
        close(result.grads, definition(p, x, norm=1.0, fn=fn)[0], msg=fn.__name__)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_as_strided(strategy: str) -> None:
    """Of a parameter, any layout, and of an activation, with overlaps."""
    p, x = {"w": draw(3, 3), "t": draw(2, 3).t()}, draw(B, 3)

    def loss(p: Params, x: Tensor) -> Tensor:
        h = (x @ p["w"].as_strided((3, 3), (1, 3)) @ p["t"].as_strided((3, 2), (2, 1))).sin()
        return (
            h.as_strided((2, 1), (1, 1)) * torch.as_strided(F.linear(x, p["w"]), (2, 2), (1, 1))
        ).sum()

    result = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))(p, x)
    close(result.grads, definition(p, x, norm=1.0, fn=loss)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_select_scatter(strategy: str) -> None:
    """Of what depends on parameters, by all of its names; under vmap PyTorch counts its gradient several times."""
    p, x = {"w": draw(4, 3)}, draw(B, 5, 4)

    def loss(p: Params, x: Tensor) -> Tensor:
        row = p["w"][:, 0]
        y = torch.select_scatter(x[0], row * x[0, 1], 0, 2).sin()
        y = y.select_scatter(p["w"][0, :].sum() * x[0, :, 1], dim=-1, index=-1).cos()
        return torch.ops.aten.select_scatter(y, row, -2, 0).sum()

    result = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))(p, x)
    close(result.grads, definition(p, x, norm=1.0, fn=loss)[0])
    with pytest.raises(IndexError):
        clipped_grad(
            lambda p, x: torch.select_scatter(x[0], p["w"][:, 0], 0, 5).sum(), max_grad_norm=1.0
        )(p, x)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has none")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_linear_cross_entropy(strategy: str) -> None:
    p, x, y = {"w": draw(5, 3), "b": draw(5)}, draw(B, 3), torch.arange(B) % 5

    def loss(p: Params, x: Tensor, y: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, p["w"], y, linear_bias=p["b"], options=options)

    result = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))(
        p, x, y
    )
    expected = definition(
        p, x, y, norm=1.0, fn=lambda p, x, y: F.cross_entropy(F.linear(x, p["w"], p["b"]), y)
    )
    close(result.grads, expected[0])


def test_batch_that_requires_grad(params: Params, batch: Any) -> None:
    x = batch[0].clone().requires_grad_()
    close(
        clipped_grad(mlp, max_grad_norm=0.5)(params, x, batch[1]).grads,
        definition(params, *batch, norm=0.5)[0],
    )
    assert x.grad is None


def test_parameters_of_any_layout() -> None:
    """Views, transposed and channels-last parameters; one that shares memory with another."""
    base = draw(4, 4)
    p = {
        "t": base.t(),
        "row": base[0],
        "conv": draw(2, 1, 2, 2).contiguous(memory_format=torch.channels_last),
    }

    def loss(p: Params, x: Tensor) -> Tensor:
        image = F.conv2d(x.view(1, 1, 2, 2), p["conv"]).sum()
        return (F.linear(x, p["t"]) * p["row"]).square().sum() * image

    x = draw(B, 4)
    result = clipped_grad(loss, max_grad_norm=1.0)(p, x)
    close(result.grads, definition(p, x, norm=1.0, fn=loss)[0])


def test_what_is_kept_of_a_configuration_belongs_to_it_alone(params: Params, batch: Any) -> None:
    """Sensitivity by relation and norm; groups by names, dtypes of sums by dtypes."""
    one = clipped_grad(mlp, max_grad_norm=1.0)
    for gradient, norm in ((one, 1.0), (one.with_max_grad_norm(3.0), 3.0), (one, 1.0)):
        assert gradient.sensitivity() == norm
        assert gradient.sensitivity(Relation.REPLACE_ONE) == 2 * norm
        assert gradient.sensitivity() == norm
    for dtype in (torch.float64, torch.float32):
        cast = {name: p.to(dtype) for name, p in params.items()}
        result = one(cast, batch[0].to(dtype), batch[1])
        assert {g.dtype for g in result.grads.values()} == {dtype}
    groups = clipped_grad(
        lambda p, x, y: mlp({n.partition("/")[2]: v for n, v in p.items()}, x, y),
        max_grad_norm={"a": 0.1, "b": 0.2},
    )
    for first in ("a", "b"):
        second = "b" if first == "a" else "a"
        named = {f"{first if n == 'in.w' else second}./{n}": p for n, p in params.items()}
        norms = groups(named, *batch).grad_norms
        alone = clipped_grad(mlp, max_grad_norm={"in.w": 1.0, "": 1.0})(params, *batch).grad_norms
        close(norms[first], alone["in.w"])


def test_trees_of_any_kind_have_the_same_names(params: Params, batch: Any) -> None:
    """A flat dictionary takes a road of its own."""
    renamed = {name.replace(".", "_"): p for name, p in params.items()}

    def loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
        return mlp({name: p[name.replace(".", "_")] for name in params}, x, y)

    norms = {name: 0.1 * (i + 1) for i, name in enumerate(renamed)}
    expected = clipped_grad(loss, max_grad_norm=norms)(renamed, *batch)
    ordered = clipped_grad(loss, max_grad_norm=norms)(OrderedDict(renamed), *batch)
    assert type(ordered.grads) is OrderedDict
    assert type(expected.grads) is dict
    assert_same(dataclasses.replace(ordered, grads=dict(ordered.grads)), expected)
    tied = {"a": renamed["in_w"], "b": renamed["in_w"]}
    with pytest.raises(ValueError, match="'b' and 'a' are the same tensor"):
        clipped_grad(loss, max_grad_norm=1.0)(tied, *batch)
