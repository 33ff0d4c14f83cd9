"""What DPOptimizer refuses to be made of or called with; each message names the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clipgrad import DPOptimizer
from clipgrad.errors import NotPerSampleError
from tests.dp_tools import assert_same, data, mlp, private, sgd, squared, values

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": -0.1}, r"noise_multiplier must be finite and at least 0, got -0\.1"),
        ({"noise_multiplier": NAN}, "noise_multiplier must be finite"),
        ({"noise_multiplier": INF}, "noise_multiplier must be finite"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm must be a non-negative number .* got -1\.0"),
        ({"max_grad_norm": NAN}, "max_grad_norm must be a non-negative number"),
        ({"max_grad_norm": {"0": 1.0, "2": -1.0}}, r"max_grad_norm\['2'\]"),
        ({"max_grad_norm": {"0": 1.0}}, r"'2\.weight' matches no group.*add an entry"),
        ({"max_grad_norm": {"": 1.0, "head": 1.0}}, r"starts with 'head'.*\['0', '2'\].*Remove"),
        ({"expected_batch_size": 0}, "expected_batch_size must be a positive finite number, got 0"),
        ({"expected_batch_size": -3}, "expected_batch_size must be a positive"),
        ({"expected_batch_size": INF}, "expected_batch_size must be a positive finite"),
        ({"expected_batch_size": NAN}, "expected_batch_size must be a positive finite"),
        ({"microbatch_size": 0}, "microbatch_size must be a positive integer, or None"),
        ({"microbatch_size": 2.0}, "microbatch_size must be a positive integer"),
        ({"microbatch_size": True}, "microbatch_size must be a positive integer"),
        ({"relation": "neighbours"}, "neighbours"),
        ({"noise_multiplier": 1.0, "max_grad_norm": INF}, r"sensitivity.*finite max_grad_norm.*noise_multiplier=0"),
        ({"noise_multiplier": 1.0, "max_grad_norm": {"0": 1.0, "": INF}}, "finite max_grad_norm"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "positive, finite max_grad_norm"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private(mlp(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": INF},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": {"": 1.0}},
        {"expected_batch_size": 0.5},
        {"noise_multiplier": 1, "max_grad_norm": 1, "expected_batch_size": 1},
        {"relation": "replace_one"},
    ],
)
def test_arguments_at_the_edge_are_allowed(options: dict[str, Any]) -> None:
    optimizer = private(mlp(), **options)
    optimizer.backward(data())
    optimizer.step()


@pytest.mark.parametrize("missing", ["max_grad_norm", "noise_multiplier", "expected_batch_size"])
def test_what_privacy_depends_on_has_no_default(missing: str) -> None:
    model = mlp()
    options = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4}
    del options[missing]
    with pytest.raises(TypeError, match=missing):
        DPOptimizer(sgd(model), model, squared, **options)  # type: ignore[arg-type]


def test_unknown_arguments_are_errors() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="max_norm"):
        private(model, max_norm=1.0)
    with pytest.raises(TypeError, match="sample_weight"):
        private(model).backward(data(), sample_weight=data())  # type: ignore[call-arg]


def test_optimizers_that_cannot_be_wrapped() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"ordinary torch\.optim\.Optimizer, got DPOptimizer"):
        private(model, inner=private(model))
    with pytest.raises(ValueError, match="ordinary"):
        DPOptimizer(
            model.parameters(),  # type: ignore[arg-type]
            model,
            squared,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=1,
        )
    with pytest.raises(ValueError, match=r"LBFGS.*neither clipped nor noised.*SGD or AdamW"):
        private(model, inner=torch.optim.LBFGS(model.parameters()))


def test_parameters_outside_the_model() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"4 parameter\(s\) that are not in the model.*\(6, 4\)"):
        private(model, inner=sgd(mlp()))
    extra = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"1 parameter\(s\).*Build it from model\.parameters\(\)"):
        private(model, inner=torch.optim.SGD([*model.parameters(), extra], lr=1.0))


def test_nothing_to_train() -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model that requires grad"):
        private(model)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss(), None, 3])
def test_a_criterion_is_not_a_loss_function(loss_fn: Any) -> None:
    with pytest.raises(
        ValueError, match=r"loss_fn\(model, \*batch\).*Wrap a criterion: def loss_fn"
    ):
        private(mlp(), loss_fn)


def test_the_model_must_be_a_module() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got function"):
        DPOptimizer(
            sgd(model),
            squared,  # type: ignore[arg-type]
            squared,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=1,
        )


def test_step_takes_no_closure() -> None:
    model = mlp()
    optimizer, before = private(model), values(model)
    optimizer.backward(data())
    with pytest.raises(ValueError, match=r"closure.*backward\(\*batch\) and then step\(\)"):
        optimizer.step(lambda: squared(model, data()))  # type: ignore[arg-type]
    assert_same(values(model), before)
    optimizer.step()


def test_batch_norm_is_refused_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(
        NotPerSampleError, match=r"\(1, 3\).*replace_batch_norm\(model\).*\.eval\(\)"
    ):
        private(model)
    private(model.eval())


def test_refused_construction_leaves_no_trace() -> None:
    model = mlp()
    inner = sgd(model)
    state = inner.state_dict()
    with pytest.raises(ValueError, match="max_grad_norm"):
        private(model, inner=inner, max_grad_norm=-1.0)
    assert inner.state_dict() == state
    assert type(inner) is torch.optim.SGD
