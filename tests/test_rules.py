"""Every rule against the definition, over every case that tests/rule_cases knows."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgrad
from clipgrad.rules import Call, Decline, PerSample, Recipe, register_rule, unregister_rule
from clipgrad.testing import RuleCase, assert_rule_matches_reference
from tests import rule_cases

CASES: list[RuleCase] = [
    case
    for module in pkgutil.iter_modules(rule_cases.__path__)
    for case in getattr(importlib.import_module(f"tests.rule_cases.{module.name}"), "CASES", ())
]


# PyTorch's own remarks on speed.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "microbatch_sizes",
    [
        pytest.param((3,), id="parts"),
        # What a rule makes of one sample, the last of two parts shows as well; whole batches are in test_architectures.
        pytest.param((1, None), id="single and whole", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.name}")
def test_rule(case: RuleCase, microbatch_sizes: tuple[int | None, ...]) -> None:
    # All strategies in one test: they share the costly part, the definition.
    assert_rule_matches_reference(case, microbatch_sizes=microbatch_sizes)


@pytest.mark.parametrize("name", sorted({rule.name for rule in clipgrad.rules.rules().values()}))
def test_every_rule_has_cases(name: str) -> None:
    assert any(case.rule == name for case in CASES), f"tests/rule_cases knows no use of {name!r}"


def test_names_of_cases_are_unique() -> None:
    names = [(case.rule, case.name) for case in CASES]
    assert len(names) == len(set(names))


# ------------------------------------------------- the assertion itself must be able to fail


def double(x: Tensor, weight: Tensor) -> Tensor:
    """An operation of the test's own, so that rules for it can be wrong in known ways."""
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(double, (x, weight), x, weight)
    return 2 * x * weight


def correct(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    data = call.batched(x)
    return call.finish(
        2 * data * call.shared(weight),
        Recipe(weight, lambda g: PerSample((2 * g * data).sum(1))),
        saved=(data,),
    )


def returns_a_view(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    """Correct as well, although autograd forgets the hooks of a view that is written to."""
    data = call.batched(x)
    return call.finish(
        (2 * data * call.shared(weight)).flatten().view(data.shape),
        Recipe(weight, lambda g: PerSample((2 * g * data).sum(1))),
        saved=(data,),
    )


def forgets_a_factor(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    data = call.batched(x)
    return call.finish(
        2 * data * call.shared(weight), Recipe(weight, lambda g: PerSample((g * data).sum(1)))
    )


def mixes_samples(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    data = call.batched(x)
    return call.finish(
        2 * data * call.shared(weight),
        Recipe(weight, lambda g: PerSample((2 * g * data).sum(1).roll(1, 0))),
    )


def wrong_value(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    data = call.batched(x)
    return call.finish(
        3 * data * call.shared(weight), Recipe(weight, lambda g: PerSample((2 * g * data).sum(1)))
    )


def forgets_the_parameter(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    return call.finish(2 * call.batched(x) * call.shared(weight))


def declines(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    raise Decline


def draw_weights() -> dict[str, Tensor]:
    return {"w": torch.randn(3, dtype=torch.float64), "v": torch.randn(3, dtype=torch.float64)}


def squares(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (double(x, params["w"]) + params["v"]).square().sum()


CASE = RuleCase(
    "double",
    "own",
    squares,
    draw_weights,
    lambda size: (torch.randn(size, 3, dtype=torch.float64),),
)


def check(rule: Callable[..., Tensor], case: RuleCase = CASE) -> None:
    register_rule(double, name="double")(rule)
    try:
        assert_rule_matches_reference(case)
    finally:
        unregister_rule(double)


def test_a_correct_rule_passes() -> None:
    check(correct)
    check(declines, replace(CASE, declines=True))
    in_place = replace(CASE, loss=lambda p, x: double(x + p["v"], p["w"]).mul_(3).sin_().sum())
    check(returns_a_view, in_place)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (forgets_a_factor, r"rule 'double', case 'own'(?s:.*)strategy kept.*microbatch 1: grads\['w'\] off by"),
        (mixes_samples, r"strategy ghost, batch of 5, microbatch None: norms off by"),
        (wrong_value, r"microbatch 3: losses off by"),
        (declines, "the rule did not run"),
    ],
)  # fmt: skip
def test_a_wrong_rule_fails(rule: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(rule)


def test_a_rule_that_forgets_a_parameter_is_told_at_once() -> None:
    with pytest.raises(
        RuntimeError, match=r"rule 'double' used parameter 'w' .* its gradient would be lost"
    ):
        check(forgets_the_parameter)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            replace(CASE, loss=lambda p, x: double(x, p["w"]).sum() + 0 * p["v"].sum()),
            "does not depend on parameter 'v'",
        ),
        (
            replace(CASE, batch=lambda size: (torch.ones(size, 3),)),
            "all samples have the same norm",
        ),
        (
            replace(CASE, params=lambda: {n: p.float() for n, p in draw_weights().items()}),
            "parameters must be float64",
        ),
        (replace(CASE, rule="doubel"), "no rule named 'doubel'"),
        (replace(CASE, declines=True), "the rule ran, but declines=True"),
    ],
)
def test_a_case_that_proves_nothing_fails(case: RuleCase, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(correct, case)


def test_rules_are_back_after_the_check() -> None:
    before = dict(clipgrad.rules.rules())
    check(correct)
    assert dict(clipgrad.rules.rules()) == before
    assert F.linear in before
