"""One call of an operator inside a loss, by clipgrad and by a loop over samples.

A floating-point operand is per-sample in one of three ways: the parameter times the sample's data, the parameter alone
(the data stays a constant factor behind the operation), or data times a parameter in transposed or flipped memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import clipgrad
from clipgrad.engine import reference
from clipgrad.errors import NotPerSampleError

BATCH = 3
VERDICTS = ("exact", "refused", "wrong", "foreign", "skipped")
ROADS = ("data", "all data", "parameter", "transposed", "flipped")
TOLERANCE = 1e-9  # of what the loop finds; wrong batching rules are off by percents


@dataclass(frozen=True)
class Case:
    """A call of an operator, one of whose operands (or all) is computed from a parameter and a sample.

    Attributes:
        operator: Its name in the database.
        function: The operator.
        leaves: All arguments, flattened.
        structure: The way back to ``(args, kwargs)``.
        chosen: Places of the operands that a parameter and the sample make.
        road: How: one of ``ROADS``.
    """

    operator: str
    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    structure: Any
    chosen: tuple[int, ...]
    road: str


@dataclass(frozen=True)
class Verdict:
    """One of ``VERDICTS``, and why."""

    kind: str
    reason: str = ""


def cases_of(operator: Any, samples: int | None = None) -> Iterator[Case]:
    """Every call that the database has of an operator, with every floating-point operand per-sample in turn.

    Args:
        operator: An ``OpInfo``.
        samples: Take as many of its calls, at equal distances. None: take all.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the database itself calls to make its samples
        calls = list(operator.sample_inputs("cpu", torch.float64, requires_grad=False))
    if samples is not None:
        calls = calls[:: max(1, len(calls) // samples)][:samples]
    name = f"{operator.name}.{operator.variant_test_name}".rstrip(".")
    for call in calls:
        leaves, structure = tree_flatten(((call.input, *call.args), call.kwargs))
        operands = [place for place, leaf in enumerate(leaves) if _is_operand(leaf)]
        # Of a long list of operands, the first and the last one stand for all.
        for place in operands if len(operands) <= 4 else [*operands[:2], operands[-1]]:
            for road in ROADS:
                chosen = tuple(operands) if road == "all data" else (place,)
                if road == "all data" and (place != operands[0] or len(operands) == 1):
                    continue
                if road == "transposed" and leaves[place].dim() < 2:
                    continue
                if road == "flipped" and leaves[place].dim() < 1:
                    continue
                yield Case(name, operator.op, tuple(leaves), structure, chosen, road)


def _is_operand(leaf: Any) -> bool:
    return (
        isinstance(leaf, Tensor)
        and leaf.dtype == torch.float64
        and leaf.layout is torch.strided
        and not leaf.is_conj()
    )


def _operand(parameter: Tensor, factor: Tensor, road: str) -> Tensor:
    """What the loss passes to the operator; its values stay close to the parameter's, which fit the operator."""
    if road == "parameter":
        return parameter
    value = parameter * factor
    if road == "transposed":
        return value.mT.contiguous().mT
    if road == "flipped":
        return value.flip(0).flip(0)
    return value


def loss_of(case: Case) -> Callable[..., Tensor]:
    """A loss that weighs every number that the operator returns differently."""

    def loss(params: dict[str, Tensor], factor: Tensor) -> Tensor:
        scale = factor[0]
        leaves = list(case.leaves)
        for place in case.chosen:
            leaves[place] = _operand(params[str(place)], scale, case.road)
        args, kwargs = tree_unflatten(leaves, case.structure)
        total = scale * 0.0 + sum(p.sum() for p in params.values()) * scale * 0.25
        for index, output in enumerate(tree_flatten(case.function(*args, **kwargs))[0]):
            if isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex()):
                real = torch.view_as_real(output) if output.is_complex() else output
                flat = real.to(torch.float64).reshape(-1)
                weights = torch.linspace(0.5, 1.5 + index, flat.numel(), dtype=torch.float64)
                total = total + (flat.sin() * weights).sum() * scale
        return total

    return loss


def judge(case: Case) -> Verdict:
    """What becomes of one case."""
    params = {str(place): case.leaves[place].detach().clone() for place in case.chosen}
    factors = 1 + torch.arange(BATCH, dtype=torch.float64) / 64
    loss = loss_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an operation that vmap loops over announces it
        expected = _by_loop(loss, params, factors)
        if isinstance(expected, Verdict):
            return expected
        sums, norms = expected
        try:
            result = clipgrad.clipped_grad(loss, max_grad_norm=1.5)(params, factors)
        except NotPerSampleError as error:
            return Verdict("refused", str(error))
        except Exception as error:
            return Verdict("foreign", f"{type(error).__name__}: {error}")
    if not _close(result.grad_norms, norms):
        return Verdict("wrong", f"norms {result.grad_norms.tolist()}, not {norms.tolist()}")
    if not all(_close(result.grads[name], sums[name]) for name in sums):
        return Verdict("wrong", "the clipped sum")
    return Verdict("exact")


def _by_loop(
    loss: Callable[..., Tensor], params: dict[str, Tensor], factors: Tensor
) -> tuple[dict[str, Tensor], Tensor] | Verdict:
    found = []
    try:
        for seed in (0, 1):
            torch.manual_seed(seed)
            # The database has random operators set the seed themselves, which they do for all samples at once here.
            # They put the state back afterwards, which would hide that they drew.
            before = torch.get_rng_state()
            with mock.patch("torch.manual_seed"), mock.patch("torch.set_rng_state"):
                found.append(reference.per_sample_gradients_by_loop(loss, params, factors))
            if not torch.equal(before, torch.get_rng_state()):
                return Verdict("skipped", "random")
    except Exception as error:
        return Verdict("skipped", f"the loop fails: {type(error).__name__}")
    (values, each), (other_values, others) = found
    if not all(gradient.isfinite().all() for gradient in each.values()):
        return Verdict("skipped", "the gradient is not finite")
    if not torch.equal(values, other_values) or any(
        not torch.equal(each[name], others[name]) for name in each
    ):
        return Verdict("skipped", "random")
    return reference.clipped_sum(each, 1.5)


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    return bool((found - expected).abs().le(TOLERANCE * scale).all())
