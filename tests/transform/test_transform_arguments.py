"""Where parameters and batch stand among the arguments, and what they may look like."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.engine.reference import Params, clipped_sum, per_sample_gradients_by_loop
from tests.small_mlp import INPUTS, STRATEGIES, B, close, definition, draw, mlp


def test_argnums(params: Params, batch: Any) -> None:
    expected = clipped_grad(mlp, max_grad_norm=0.5)(params, *batch).grads

    def last(x: Tensor, y: Tensor, p: Params) -> Tensor:
        return mlp(p, x, y)

    for argnums in (2, -1):
        close(
            clipped_grad(last, max_grad_norm=0.5, argnums=argnums)(*batch, params).grads, expected
        )

    def split(first: Params, x: Tensor, second: Params, y: Tensor) -> Tensor:
        return mlp({**first, **second}, x, y)

    halves = [
        {n: p for n, p in params.items() if n.startswith("in") is inner} for inner in (True, False)
    ]
    gradient = clipped_grad(split, max_grad_norm=0.5, argnums=(0, 2))
    result = gradient(halves[0], batch[0], halves[1], batch[1])
    assert isinstance(result.grads, tuple)
    close({**result.grads[0], **result.grads[1]}, expected)
    grouped = clipped_grad(
        split, max_grad_norm={"0": 0.5, "1.out": 0.5, "1.gain": 0.5}, argnums=(0, 2)
    )
    assert set(grouped(halves[0], batch[0], halves[1], batch[1]).grad_norms) == {
        "0",
        "1.out",
        "1.gain",
    }


def test_other_arguments_pass_through(params: Params, batch: Any) -> None:
    table, switch = draw(B + 1, 3), object()
    seen = []

    def loss(p: Params, x: Tensor, y: Tensor, table: Tensor, more: object) -> Tensor:
        seen.append((table, more))
        return mlp(p, x, y)

    gradient = clipped_grad(loss, max_grad_norm=0.5, batch_argnums=(1, 2))
    close(
        gradient(params, *batch, table, switch).grads,
        clipped_grad(mlp, max_grad_norm=0.5)(params, *batch).grads,
    )
    assert seen[0][0] is table
    assert seen[0][1] is switch


class Pair(NamedTuple):
    weight: Tensor
    bias: Tensor


def test_pytrees_in_and_out(params: Params, batch: Any) -> None:
    tree = {
        "layers": [Pair(params["in.w"], params["in.b"])],
        "head": (params["out.w"],),
        "gain": params["gain"],
    }

    def loss(t: Any, data: Any) -> Tensor:
        flat = {"in.w": t["layers"][0].weight, "in.b": t["layers"][0].bias}
        assert data["flag"] is None
        assert data["power"] == 1
        return mlp(flat | {"out.w": t["head"][0], "gain": t["gain"]}, data["x"], *data["labels"])

    data = {"x": batch[0], "labels": [batch[1]], "flag": None, "power": 1}
    result = clipped_grad(loss, max_grad_norm={"layers.0": 0.5, "head": 0.5, "gain": 0.5})(
        tree, data
    )
    gradients = per_sample_gradients_by_loop(mlp, params, *batch)[1]
    pair = result.grads["layers"][0]
    assert isinstance(pair, Pair)
    names = ("in.w", "in.b")
    sums = clipped_sum({n: gradients[n] for n in names}, 0.5)[0]
    close([pair.weight, pair.bias], [sums[n] for n in names])
    close(result.grads["gain"], clipped_sum({"g": gradients["gain"]}, 0.5)[0]["g"])


def test_parameters_may_be_one_tensor() -> None:
    w, x = draw(3), draw(B, 3)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).square().sum()

    result = clipped_grad(loss, max_grad_norm={"": 0.5})(w, x)
    expected = definition({"w": w}, x, norm=0.5, fn=lambda p, x: loss(p["w"], x))[0]
    close(result.grads, expected["w"])


def test_aux(params: Params, batch: Any) -> None:
    def loss(p: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        logits = F.linear(F.linear(x, p["in.w"]).tanh(), p["out.w"])
        aux = {"logits": logits, "more": [logits.argmax(-1), x.sum(), p["gain"], torch.ones(2)]}
        return F.cross_entropy(logits, y) * p["gain"], aux

    for microbatch in (None, 4):
        gradient = clipped_grad(loss, max_grad_norm=0.5, has_aux=True, microbatch_size=microbatch)
        result = gradient(params, *batch)
        logits, (labels, sums, gain, ones) = result.aux["logits"], result.aux["more"]
        hidden = (batch[0] @ params["in.w"].T).tanh()
        close(logits[:, 0], hidden @ params["out.w"].T)
        close(labels, logits.argmax(-1))
        close(sums, batch[0].sum(1))
        assert (gain.shape, ones.shape) == ((B,), (B, 2))
        assert not any(t.requires_grad for t in (logits, labels, sums, gain, ones))
    expected = definition(params, *batch, norm=0.5, fn=lambda p, x, y: loss(p, x, y)[0])[0]
    close(result.grads, expected)


def test_without_batch_dim(params: Params, batch: Any) -> None:
    def one(p: Params, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == (INPUTS,)
        assert y.shape == ()
        return mlp(p, x, y)

    result = clipped_grad(one, max_grad_norm=0.5, keep_batch_dim=False)(params, *batch)
    close(result.grads, definition(params, *batch, norm=0.5)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_users_of_several_samples(params: Params, strategy: str) -> None:
    """Each element of the batch is all data of a user: clipped together, per user."""
    users = draw(4, 3, INPUTS), torch.randint(2, (4, 3))
    for options in ({}, {"microbatch_size": 3}):
        gradient = clipped_grad(
            mlp,
            max_grad_norm=0.5,
            keep_batch_dim=False,
            performance=Performance(strategy=strategy),
            **options,
        )
        result = gradient(params, *users)
        expected = definition(params, *users, norm=0.5, fn=lambda p, x, y: mlp(p, x[0], y[0]))
        close(result.grads, expected[0])
        close(result.grad_norms, expected[1])


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"argnums": 5}, r"argnums=\(5,\) does not fit a call with 3 positional arguments"),
        ({"argnums": -4}, r"argnums=\(-4,\) does not fit"),
        ({"batch_argnums": 3}, r"batch_argnums=\(3,\) does not fit"),
        (
            {"batch_argnums": (0, 1)},
            r"argnums=\(0,\) and batch_argnums=\(0, 1\) name an argument twice",
        ),
        ({"argnums": (0, -3)}, "name an argument twice"),
        (
            {"argnums": (0, 1, 2)},
            r"no batch argument: pass the batch.*argnums=\(0, 1, 2\) takes all of the 3",
        ),
        ({"batch_argnums": ()}, "no batch argument"),
        ({"argnums": ()}, "params holds no tensor"),
    ],
)
def test_positions_that_do_not_fit(params: Params, batch: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp, max_grad_norm=1.0, **options)(params, *batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"in.w": torch.ones(2, dtype=torch.long)},
            "leaf 'in.w' is torch.int64; every leaf must be a floating",
        ),
        ({"in.w": 1.0}, "leaf 'in.w' is float; every leaf must be"),
        ({"in.w": None}, "leaf 'in.w' is NoneType"),
        ({"in.w": torch.ones(2, dtype=torch.complex64)}, "leaf 'in.w' is torch.complex64"),
    ],
)
def test_parameters_that_are_none(params: Params, batch: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp, max_grad_norm=1.0)({**params, **change}, *batch)


def test_parameters_passed_twice(params: Params, batch: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'tied' and 'in.w' are the same tensor; pass a tied weight once"
    ):
        clipped_grad(mlp, max_grad_norm=1.0)({**params, "tied": params["in.w"]}, *batch)
    with pytest.raises(ValueError, match="params holds no tensor"):
        clipped_grad(mlp, max_grad_norm=1.0)({}, *batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.ones(3, 4), torch.ones(2)),
            r"disagree about the batch size \(\[0\]: 3, \[1\]: 2\)",
        ),
        (
            (torch.ones(3, 4), torch.tensor(1)),
            r"batch argument \[1\] is a scalar tensor and has no batch axis",
        ),
        ((1.0, None), "the batch holds no tensor"),
        # Every sample would see the labels of all.
        ((torch.ones(3, 4), np.arange(3)), r"batch argument \[1\] is ndarray, not a tensor"),
    ],
)
def test_batches_that_are_none(params: Params, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp, max_grad_norm=1.0)(params, *batch)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(B), torch.zeros(B - 1, dtype=torch.bool), torch.zeros(B, 1, dtype=torch.bool)],
)
def test_masks_that_are_none(params: Params, batch: Any, mask: Tensor) -> None:
    with pytest.raises(
        ValueError, match=rf"is_padding must be a boolean tensor of shape \({B},\), got"
    ):
        clipped_grad(mlp, max_grad_norm=1.0)(params, *batch, is_padding=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a non-negative number"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be a non-negative number"),
        ({"max_grad_norm": {"a": -1.0}}, r"max_grad_norm\['a'\] must be a non-negative number"),
        ({"max_grad_norm": {}}, "max_grad_norm is an empty mapping"),
        ({"microbatch_size": 0}, "microbatch_size must be a positive integer"),
        ({"microbatch_size": 2.0}, "microbatch_size must be a positive integer"),
        ({"microbatch_size": True}, "microbatch_size must be a positive integer"),
        ({"normalize_by": 0}, "normalize_by must be a positive finite number, got 0"),
        ({"normalize_by": math.inf}, "normalize_by must be a positive finite number"),
    ],
)
def test_options_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp, **{"max_grad_norm": 1.0, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_dtype": torch.int32}, "accumulate_dtype must be a floating-point dtype"),
        ({"accumulate_dtype": "float32"}, r"a torch\.dtype, such as torch\.float32, got 'float32'"),
        ({"accumulate_dtype": torch.bfloat16}, "of at least 32 bits, got torch.bfloat16"),
        ({"randomness": "no"}, "randomness must be one of 'different', 'same', 'error', got 'no'"),
        (
            {"strategy": "fast"},
            "strategy must be one of 'auto', 'kept', 'ghost', got 'fast'",
        ),
        ({"memory_budget": -1}, "memory_budget must be a non-negative number of bytes"),
        ({"memory_budget": math.nan}, "memory_budget must be a non-negative number of bytes"),
    ],
)
def test_performance_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Performance(**options)


def test_performance_is_no_dictionary() -> None:
    with pytest.raises(TypeError, match=r"performance must be a clipgrad\.Performance"):
        clipped_grad(mlp, max_grad_norm=1.0, performance={"strategy": "kept"})  # type: ignore[arg-type]


def test_unknown_options(params: Params, batch: Any) -> None:
    with pytest.raises(TypeError, match="max_norm"):
        clipped_grad(mlp, max_grad_norm=1.0, max_norm=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="padding"):
        clipped_grad(mlp, max_grad_norm=1.0)(params, *batch, padding=None)  # type: ignore[call-arg]


def test_inference_mode(params: Params, batch: Any) -> None:
    gradient = clipped_grad(mlp, max_grad_norm=1.0)
    with torch.inference_mode():
        made_here = params["in.w"].clone()
        with pytest.raises(ValueError, match=r"under torch.inference_mode\(\).*use torch.no_grad"):
            gradient(params, *batch)
    with pytest.raises(ValueError, match=r"made under torch.inference_mode\(\)"):
        gradient({**params, "in.w": made_here}, *batch)
