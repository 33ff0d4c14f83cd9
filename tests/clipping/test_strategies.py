"""Strategies of clipped_grad: equal to their formulas, whatever the microbatch, the plan or the compiler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import AdaptiveQuantile, Automatic, Performance, PerLayer, Relation, clipped_grad
from clipgrad.clipping import Clipping, make_clipping
from clipgrad.engine.reference import Params, per_sample_gradients_by_loop
from tests.clipping.reference import groups_of, scaled_sum
from tests.compiled.conftest import Graphs
from tests.small_mlp import STRATEGIES as PLANS
from tests.small_mlp import B, close, draw, make_batch, make_params, mlp

CASES: dict[str, Any] = {
    "automatic": Automatic(0.7, gamma=0.05),
    "automatic by default": Automatic(),
    "per layer": PerLayer(0.3),
    "per layer by size": PerLayer(0.3, weights="size"),
    "per layer, automatic": PerLayer(Automatic(0.3)),
    "by size, automatic": PerLayer(Automatic(0.3, 0.2), weights="size"),
    "groups of both kinds": {"in": Automatic(0.3), "": 0.2},
    "nothing": Automatic(0.0),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case: str, plan: str) -> None:
    params, batch = make_params(), make_batch()
    groups = groups_of(CASES[case], params)
    sums, norms = scaled_sum(per_sample_gradients_by_loop(mlp, params, *batch)[1], groups)
    above = torch.stack([norms[g] > bound for g, (_, bound, _) in groups.items()]).any(0)
    for size in (None, 1, 4, 5):
        gradient = clipped_grad(
            mlp,
            max_grad_norm=CASES[case],
            performance=Performance(strategy=plan),
            microbatch_size=size,
        )
        result = gradient(params, *batch)
        close(result.grads, sums, rtol=1e-9, atol=1e-12)
        found = result.grad_norms
        close(dict(found) if isinstance(found, dict) else {"": found}, norms, rtol=1e-9, atol=1e-12)
        assert int(result.num_clipped) == int(above.sum())


@pytest.mark.parametrize(
    "case", ["automatic", "per layer by size", "per layer, automatic", "groups of both kinds"]
)
def test_compiled_equals_the_formula(case: str, graphs: Graphs) -> None:
    params, batch = make_params(), make_batch()
    per_sample = per_sample_gradients_by_loop(mlp, params, *batch)[1]
    sums, _ = scaled_sum(per_sample, groups_of(CASES[case], params))
    gradient = clipped_grad(mlp, max_grad_norm=CASES[case], microbatch_size=4, compile=True)
    close(gradient(params, *batch).grads, sums, rtol=1e-9, atol=1e-12)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_really_compiled_equals_the_formula() -> None:
    params, batch = make_params(), make_batch()
    per_sample = per_sample_gradients_by_loop(mlp, params, *batch)[1]
    gradient = clipped_grad(mlp, max_grad_norm=PerLayer(Automatic(0.3)), compile=True)
    for norm in (0.3, 0.6, 0.01):
        strategy = PerLayer(Automatic(norm))
        sums, _ = scaled_sum(per_sample, groups_of(strategy, params))
        result = gradient.with_max_grad_norm(strategy)(params, *batch)
        close(result.grads, sums, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_and_a_padded_one_contribute_nothing(
    case: str, poison: float
) -> None:
    params, (x, y) = make_params(), make_batch()
    x[1] = poison
    rest = [0, 3, 4, 5]
    per_sample = per_sample_gradients_by_loop(mlp, params, x[rest], y[rest])[1]
    sums, _ = scaled_sum(per_sample, groups_of(CASES[case], params))
    gradient = clipped_grad(mlp, max_grad_norm=CASES[case])
    result = gradient(params, x, y, is_padding=torch.arange(B) == 2)
    close(result.grads, sums, rtol=1e-9, atol=1e-12)
    assert (result.batch_size, int(result.num_nonfinite)) == (B - 1, 1)


def test_a_zero_gradient_contributes_zero_when_normalised() -> None:
    def half_silent(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return mlp(p, x, y) * (y == 1).sum()

    params, (x, y) = make_params(), make_batch()
    for dtype in (torch.float64, torch.float32):
        typed = {name: p.to(dtype) for name, p in params.items()}
        gradient = clipped_grad(half_silent, max_grad_norm=Automatic(1e20, gamma=1e-6))
        both = gradient(typed, x.to(dtype), y).grads
        alone = gradient(typed, x[y == 1].to(dtype), y[y == 1]).grads
        assert not all((g == 0).all() for g in both.values())
        close(both, alone)


def test_layers_are_modules_of_any_tree() -> None:
    params = {"conv": {"weight": draw(2), "bias": draw(2)}, "head": [draw(2), {"w": draw(2)}]}

    def loss(p: Any, x: Tensor) -> Tensor:
        conv, head = p["conv"], p["head"]
        return (x * conv["weight"] * head[0] + conv["bias"].sin() * x * head[1]["w"]).sum()

    result = clipped_grad(loss, max_grad_norm=PerLayer(0.5))(params, draw(B, 2))
    assert list(result.grad_norms) == ["conv", "head", "head.1"]
    assert clipped_grad(lambda w, x: (w * x).sum(), max_grad_norm=PerLayer(0.5))(
        draw(2), draw(1, 2)
    ).grads.norm() == pytest.approx(0.5)


@pytest.mark.parametrize("case", CASES)
def test_resolved_bounds_never_exceed_the_sensitivity(case: str) -> None:
    params = make_params()
    gradient = clipped_grad(mlp, max_grad_norm=CASES[case])
    sizes = [p.numel() for p in params.values()]
    resolved = make_clipping(CASES[case], list(params), sizes)
    assert resolved.bound() == pytest.approx(gradient.sensitivity(), rel=1e-14)
    assert gradient.sensitivity(Relation.REPLACE_ONE) == 2 * gradient.sensitivity()


@pytest.mark.parametrize("weights", ["uniform", "size"])
def test_the_sensitivity_per_layer_is_exactly_the_norm(weights: str) -> None:
    for norm in (0.1, 0.3, 1.7):
        strategy = PerLayer(norm, weights=weights)
        assert clipped_grad(mlp, max_grad_norm=strategy).sensitivity() == norm
        gradient = clipped_grad(mlp, max_grad_norm=PerLayer(Automatic(norm), weights))
        assert gradient.sensitivity() == norm


def test_all_of_the_sensitivity_is_used_by_layers() -> None:
    params, (x, y) = make_params(), make_batch()
    gradient = clipped_grad(mlp, max_grad_norm=PerLayer(1e-3))
    norm = torch.cat([g.flatten() for g in gradient(params, x[:1], y[:1]).grads.values()]).norm()
    assert float(norm) == pytest.approx(1e-3)


def test_constant_norms_give_the_factors_that_they_always_gave() -> None:
    norms = torch.cat([torch.logspace(-30, 30, 997), torch.tensor([0.0, math.inf, math.nan])])
    for dtype in (torch.float32, torch.float64):
        n = norms.to(dtype)
        for bound in (1e-3, 0.1, 1 / 3, 1.0, 30.0):
            clip = make_clipping(bound).factors(n, 0)
            assert torch.equal(clip.nan_to_num(-1), (bound / n).clamp(max=1.0).nan_to_num(-1))
            assert clip.dtype == dtype


@pytest.mark.parametrize("rule", [0.3, Automatic(0.3, 0.02)], ids=["clip", "normalise"])
def test_norms_in_a_tensor_give_the_same_factors(rule: Any) -> None:
    norms = torch.tensor([0.0, 1e-9, 0.29, 0.31, 7.0, math.nan])
    for dtype in (torch.float32, torch.float64):
        constant = make_clipping(rule)
        read = constant.with_bounds(torch.tensor([0.3], dtype=torch.float64))
        one, other = (c.factors(norms.to(dtype), 0) for c in (constant, read))
        close(one, other, equal_nan=True)
        assert other.dtype == dtype


def test_another_norm_is_another_transform() -> None:
    params, batch = make_params(), make_batch()
    first = clipped_grad(mlp, max_grad_norm=0.3)
    first(params, *batch)
    second = first.with_max_grad_norm(0.1)
    assert (first.sensitivity(), second.sensitivity()) == (0.3, 0.1)
    close(second(params, *batch).grads, clipped_grad(mlp, max_grad_norm=0.1)(params, *batch).grads)
    groups = {"in": 0.1, "": 0.2}
    third = second.with_max_grad_norm(groups)
    groups["in"] = 5.0
    assert third.sensitivity() == pytest.approx(math.hypot(0.1, 0.2))
    assert isinstance(third(params, *batch).grad_norms, dict)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Automatic(1.0, gamma=0.0), r"gamma must be finite and at least 1e-06, got 0\.0.*AUTO-V"),
        (lambda: Automatic(1.0, gamma=math.inf), "gamma must be finite"),
        (lambda: Automatic(1.0, gamma=math.nan), "gamma must be finite"),
        (lambda: Automatic(PerLayer(1.0)), r"grouping comes first: PerLayer\(Automatic"),  # type: ignore[arg-type]
        (lambda: Automatic(Automatic(1.0)), "Automatic needs a norm"),  # type: ignore[arg-type]
        (lambda: PerLayer(PerLayer(1.0)), "PerLayer needs the norm of all groups"),  # type: ignore[arg-type]
        (lambda: PerLayer({"": 1.0}), "PerLayer needs the norm of all groups"),  # type: ignore[arg-type]
        (lambda: PerLayer(1.0, weights="depth"), "weights must be one of 'uniform', 'size', got 'depth'"),
        (lambda: AdaptiveQuantile(0.0), "initial_norm must be a positive finite number"),
        (lambda: AdaptiveQuantile(1.0, target_quantile=1.0), "target_quantile must lie strictly between"),
        (lambda: AdaptiveQuantile(1.0, learning_rate=0.0), "learning_rate must be a positive"),
        (lambda: AdaptiveQuantile(1.0, count_stddev=0.0), "count_stddev must be a positive"),
    ],
)  # fmt: skip
def test_strategies_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (lambda step: 1.0, r"max_grad_norm changes from step to step.*DPOptimizer.*with_max_grad_norm"),
        (AdaptiveQuantile(1.0), "changes from step to step"),
        (PerLayer(AdaptiveQuantile(1.0)), "changes from step to step"),
        ({"": Automatic(lambda step: 1.0)}, r"max_grad_norm\[''\] changes from step to step"),
        ({"": PerLayer(1.0)}, "groups hold no groups"),
        (PerLayer(-1.0), "max_grad_norm must be a non-negative number"),
        (PerLayer("1"), "max_grad_norm must be a number"),
        (Automatic(math.inf), "keep max_grad_norm / gamma below"),
        (Automatic(1e29), "keep max_grad_norm / gamma below"),
        (Automatic(math.nan), "max_grad_norm must be a non-negative number"),
    ],
)  # fmt: skip
def test_what_clipped_grad_refuses(strategy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp, max_grad_norm=strategy)
    with pytest.raises(ValueError, match=message):
        clipped_grad(mlp, max_grad_norm=1.0).with_max_grad_norm(strategy)


def test_layers_are_normalised_together() -> None:
    assert clipped_grad(mlp, max_grad_norm=PerLayer(2.0), normalize_by=2.0).sensitivity() == 1.0


def test_structure_knows_all_but_the_norms() -> None:
    def made(**changes: Any) -> Clipping:
        return make_clipping(**{"max_grad_norm": {"a": 1.0, "b": 2.0}, **changes})

    same = made(max_grad_norm={"a": 5.0, "b": 7.0})
    assert made().structure == same.structure
    for other in (
        made(max_grad_norm={"a": 0.0, "b": 2.0}),
        made(max_grad_norm={"a": math.inf, "b": 2.0}),
        made(max_grad_norm={"a": Automatic(1.0), "b": 2.0}),
        made(max_grad_norm={"b": 1.0, "a": 2.0}),
        made(names=["a", "b.x", "b.y"]),
    ):
        assert other.structure != made().structure


@pytest.mark.parametrize("size", [1, 3])
def test_on_a_convolution_in_float32(size: int) -> None:
    torch.manual_seed(0)
    params = {"conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.randn(4)}
    x = torch.randn(5, 3, 6, 6)

    def loss(p: Params, x: Tensor) -> Tensor:
        return F.conv2d(x, p["conv.weight"], p["conv.bias"]).square().mean()

    wide = {name: p.double() for name, p in params.items()}
    per_sample = per_sample_gradients_by_loop(loss, wide, x.double())[1]
    sums, _ = scaled_sum(per_sample, groups_of(Automatic(0.5), wide))
    result = clipped_grad(loss, max_grad_norm=Automatic(0.5), microbatch_size=size)(params, x)
    close({n: g.double() for n, g in result.grads.items()}, sums, rtol=1e-5, atol=1e-5)
