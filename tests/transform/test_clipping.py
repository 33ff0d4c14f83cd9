"""Norms, groups, rescaling and the transform before clipping, against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad import Performance, Relation, clipped_grad
from clipgrad.engine.reference import Params, clipped_sum, per_sample_gradients_by_loop
from tests.small_mlp import STRATEGIES, B, close, definition, draw, median_norm, mlp


@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.5, 1e9, math.inf])
def test_norms_at_the_ends(params: Params, batch: Any, norm: float) -> None:
    result = clipped_grad(mlp, max_grad_norm=norm)(params, *batch)
    close(result.grads, definition(params, *batch, norm=norm)[0])
    assert int(result.num_clipped) == (0 if norm > 1 else B) or norm == 0.5


def test_zero_gradient_is_not_divided_by(params: Params, batch: Any) -> None:
    def half_silent(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return mlp(p, x, y) * (y == 1).sum()

    for norm in (0.0, 1.0, math.inf):
        result = clipped_grad(half_silent, max_grad_norm=norm)(params, *batch)
        assert not result.grad_norms[batch[1] == 0].any()
        close(result.grads, definition(params, *batch, norm=norm, fn=half_silent)[0])


@pytest.mark.parametrize("microbatch", [None, 4])
def test_groups(params: Params, batch: Any, microbatch: int | None) -> None:
    groups = {"in": 0.3, "": 0.2, "in.b": 0.1}
    members = {"in": ["in.w"], "in.b": ["in.b"], "": ["out.w", "gain"]}
    gradient = clipped_grad(mlp, max_grad_norm=groups, microbatch_size=microbatch)
    result = gradient(params, *batch)
    gradients = per_sample_gradients_by_loop(mlp, params, *batch)[1]
    above = torch.zeros(B, dtype=torch.bool)
    assert list(result.grad_norms) == list(groups)
    for group, names in members.items():
        sums, norms = clipped_sum({name: gradients[name] for name in names}, groups[group])
        close({name: result.grads[name] for name in names}, sums)
        close(result.grad_norms[group], norms)
        above |= norms > groups[group]
    assert int(result.num_clipped) == int(above.sum())
    assert gradient.sensitivity() == pytest.approx(math.sqrt(0.3**2 + 0.2**2 + 0.1**2))


def test_group_names_match_whole_components() -> None:
    p = {"conv": {"weight": draw(2)}, "conv1": {"weight": draw(2)}}

    def loss(p: Any, x: Tensor) -> Tensor:
        return (x * p["conv"]["weight"] * p["conv1"]["weight"]).sum()

    with pytest.raises(
        ValueError, match=r"parameter 'conv1.weight' matches no group of \['conv'\]"
    ):
        clipped_grad(loss, max_grad_norm={"conv": 1.0})(p, draw(B, 2))
    result = clipped_grad(loss, max_grad_norm={"conv": 0.0, "conv1.weight": math.inf})(
        p, draw(B, 2)
    )
    assert not result.grads["conv"]["weight"].any()
    assert result.grads["conv1"]["weight"].all()


def test_normalising(params: Params, batch: Any) -> None:
    norm = median_norm(params, *batch)
    expected = definition(params, *batch, norm=norm)[0]
    divided = clipped_grad(mlp, max_grad_norm=norm, normalize_by=8, microbatch_size=4)
    close(divided(params, *batch).grads, {n: g / 8 for n, g in expected.items()})
    assert divided.sensitivity() == norm / 8


@pytest.mark.parametrize("microbatch", [None, 4])
def test_pre_clipping_transform(params: Params, batch: Any, microbatch: int | None) -> None:
    def transform(gradients: Params) -> Params:
        return {**gradients, "in.w": 3 * gradients["in.w"], "gain": gradients["gain"].square()}

    gradients = transform(per_sample_gradients_by_loop(mlp, params, *batch)[1])
    norm = float(clipped_sum(gradients, 1.0)[1].median())
    for strategy in STRATEGIES:
        gradient = clipped_grad(
            mlp,
            max_grad_norm=norm,
            pre_clipping_transform=transform,
            microbatch_size=microbatch,
            performance=Performance(strategy=strategy),
        )
        result = gradient(params, *batch)
        sums, norms = clipped_sum(gradients, norm)
        close(result.grads, sums)
        close(result.grad_norms, norms)


def test_pre_clipping_sees_unused_parameters(params: Params, batch: Any) -> None:
    params["unused"] = draw(2, 2)
    seen: list[Params] = []

    def transform(gradients: Params) -> Params:
        seen.append(gradients)
        return gradients

    result = clipped_grad(mlp, max_grad_norm=1.0, pre_clipping_transform=transform)(params, *batch)
    assert {n: g.shape for n, g in seen[0].items()} == {n: (B, *p.shape) for n, p in params.items()}
    close(result.grads, definition(params, *batch, norm=1.0)[0])


@pytest.mark.parametrize(
    "transform",
    [
        lambda g: None,
        lambda g: list(g.values()),
        lambda g: {"in.w": g["in.w"]},
        lambda g: {**g, "gain": None},
        lambda g: {**g, "gain": g["gain"][0]},
        lambda g: {**g, "gain": g["gain"].long()},
        lambda g: {name: t.sum(0) for name, t in g.items()},
    ],
)
def test_pre_clipping_transform_keeps_the_structure(
    params: Params, batch: Any, transform: Callable[[Params], Any]
) -> None:
    gradient = clipped_grad(mlp, max_grad_norm=1.0, pre_clipping_transform=transform)
    with pytest.raises(ValueError, match="pre_clipping_transform must return per-sample gradients"):
        gradient(params, *batch)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"in": 1.0, "out": 1.0}, "parameter 'gain' matches no group of"),
        ({"": 1.0, "gian": 1.0}, "no trainable parameter starts with 'gian'; its names start with"),
        ({"": 1.0, "in": 1.0, "out": 1.0, "gain": 1.0}, "no trainable parameter starts with ''"),
        ({"i": 1.0, "": 1.0}, "no trainable parameter starts with 'i'"),
    ],
)
def test_groups_that_do_not_fit(params: Params, batch: Any, groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp, max_grad_norm=groups)(params, *batch)


# --------------------------------------------------------------------------- sensitivity


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_grad_norm": 0.5}, 0.5),
        ({"max_grad_norm": 0.0}, 0.0),
        ({"max_grad_norm": math.inf}, math.inf),
        ({"max_grad_norm": 0.5, "normalize_by": 4}, 0.125),
        ({"max_grad_norm": {"a": 3.0, "b": 4.0}}, 5.0),
        ({"max_grad_norm": {"a": 3.0, "b": 4.0}, "normalize_by": 10}, 0.5),
        ({"max_grad_norm": {"a": 3.0, "b": math.inf}}, math.inf),
        ({"max_grad_norm": 0.5, "nan_safe": False}, math.inf),
        (
            {
                "max_grad_norm": 0.5,
                "microbatch_size": 2,
                "performance": Performance(strategy="ghost"),
            },
            0.5,
        ),
    ],
)
def test_sensitivity(options: Any, expected: float) -> None:
    gradient = clipped_grad(mlp, **options)
    assert gradient.sensitivity() == pytest.approx(expected)
    assert gradient.sensitivity(Relation.ADD_OR_REMOVE_ONE) == gradient.sensitivity()
    assert gradient.sensitivity(Relation.REPLACE_SPECIAL) == gradient.sensitivity()
    assert gradient.sensitivity(Relation.REPLACE_ONE) == 2 * gradient.sensitivity()


def test_unknown_relation() -> None:
    with pytest.raises(ValueError, match="replace_two"):
        clipped_grad(mlp, max_grad_norm=1.0).sensitivity("replace_two")  # type: ignore[arg-type]
