"""Compare the compiled step with the eager step before its results are used.

The comparison covers every clipped sum, loss, norm, finite flag and auxiliary output of a microbatch, at the same RNG
state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from clipgrad.clipping import Clipping
from clipgrad.engine.clip_and_sum import MicrobatchResult
from clipgrad.errors import CompileMismatchError
from clipgrad.kernels.float32_precision import product_rounding

# Relative to the sum of all samples' clipped norms. A sample that is left out or not clipped changes more than that.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same for float32 products that first round to TF32 or bfloat16, by how much these round.
_TOLERANCE_OF_PRODUCTS = {2.0**-10: 1e-2, 2.0**-7: 1e-1}
_TRIALS = 8
# Elements of a sum that are compared at a time, which bounds the memory of their differences.
_AT_ONCE = 1 << 24


class Rounding(NamedTuple):
    """How exact two correct runs of a graph are.

    Attributes:
        slack: How much they may differ, as a share of the values.
        step: Relative distance of two neighbouring numbers in the least precise dtype.
    """

    slack: float
    step: float


def is_compared(run: int) -> bool:
    """Return whether a graph's run with this number, from 1, is compared: 1, 2, 4, 8 and so on.

    So a change that PyTorch's guards do not notice cannot stay unnoticed for long.
    """
    return run & (run - 1) == 0


def rounding(module: GraphModule, device: torch.device) -> Rounding:
    """Return how exact the graph is, given its least precise dtype."""
    values = tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    found = [Rounding(_TOLERANCE[t], torch.finfo(t).eps) for t in dtypes if t in _TOLERANCE]
    step = product_rounding(device.type)
    if step and torch.float32 in dtypes:
        found.append(Rounding(_TOLERANCE_OF_PRODUCTS[step], step))
    return max(found, default=Rounding(0.0, 0.0))


def moved_by_rounding(parameters: Sequence[Tensor], step: float) -> Iterator[list[Tensor]]:
    """Yield copies of the parameters that are off by some roundings, other ones each time.

    Args:
        parameters: Floating-point tensors.
        step: See ``Rounding``.
    """
    for trial in range(1, _TRIALS + 1):
        yield [p.detach() * (1 + 4 * step * _pattern(p, trial)) for p in parameters]


def _pattern(like: Tensor, trial: int) -> Tensor:
    """Return values between -1 and 1, in an order of their own for each trial; random numbers are not needed."""
    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    return (places.mul_(trial).remainder_(17).to(like.dtype) / 8 - 1).view(like.shape)


def compare(
    compiled: MicrobatchResult,
    eager: MicrobatchResult,
    names: Sequence[str],
    clipping: Clipping,
    slack: float,
    nearby: Iterator[MicrobatchResult],
) -> None:
    """Raise ``CompileMismatchError`` if the compiled result differs from the eager result by more than rounding.

    Rounding may move an input near zero across the kink of a ReLU, or exchange the two largest values of a pool. Then
    one sample's gradient changes as a whole. In a training of thousands of steps this happens. So where the results
    differ, the eager step is repeated with parameters that are off by some roundings. The compiled result may be off by
    as much as these repetitions differ among themselves.

    Args:
        compiled: Result of the compiled step.
        eager: Result of the eager step on the same rows.
        names: Names of the parameters.
        clipping: The clipping of both.
        slack: See ``Rounding``.
        nearby: Results of the eager step with the same parameters and then with ``moved_by_rounding``. They are
            computed only if they are needed.
    """
    allowed = _Allowed(eager, names, clipping, slack)
    wrong = allowed.exceeded_by(compiled)
    if not wrong:
        return
    same = next(nearby)
    # A loss that changes from call to call differs for another reason than rounding.
    for moved in () if allowed.exceeded_by(same) else nearby:
        allowed.widen(same, moved)
        if not allowed.exceeded_by(compiled):
            return
    raise CompileMismatchError(
        f"the compiled step differs from the eager one: {', '.join(wrong[:4])}"
        f"{', ...' if len(wrong) > 4 else ''}. Its result was not used. Leave compile out, and please report the loss."
    )


class _Allowed:
    """This class holds how much a result may differ from the eager result."""

    def __init__(
        self, eager: MicrobatchResult, names: Sequence[str], clipping: Clipping, slack: float
    ) -> None:
        self._eager, self._names = eager, names
        counted = [n * clipping.factors(n, group) for group, n in enumerate(eager.norms)]
        self._scale = float(torch.stack(counted).nan_to_num(0.0, 0.0, 0.0).sum())
        self._sums = [slack * self._scale for _ in eager.sums]
        self._others = {name: _slack_of(value, slack) for name, value in _others(eager).items()}

    def exceeded_by(self, found: MicrobatchResult) -> list[str]:
        """Return what differs by more than is allowed."""
        wrong = [
            f"clipped sum of {name!r} (off by {error / max(self._scale, 1e-300):.1e} of all contributions)"
            for name, error, allowed in zip(
                self._names, _distances(found, self._eager), self._sums, strict=True
            )
            if not error <= allowed
        ]
        if not torch.equal(found.nonfinite, self._eager.nonfinite):
            wrong.append("which samples are finite")
        others, expected = _others(found), _others(self._eager)
        if others.keys() != expected.keys():
            return [*wrong, "the structure of the auxiliary output"]
        return wrong + [
            name
            for name, allowed in self._others.items()
            if not _is_close(others[name], expected[name], allowed)
        ]

    def widen(self, one: MicrobatchResult, other: MicrobatchResult) -> None:
        """Allow twice what two eager results differ, since the compiled one may be off in the other direction."""
        for index, error in enumerate(_distances(one, other)):
            if math.isfinite(error):
                self._sums[index] = max(self._sums[index], 2 * error)
        others, expected = _others(one), _others(other)
        for name, allowed in self._others.items():
            change = (_wide(others[name]) - _wide(expected[name])).abs()
            self._others[name] = allowed.maximum(2 * change.nan_to_num(0.0, 0.0, 0.0))


def _distances(one: MicrobatchResult, other: MicrobatchResult) -> list[float]:
    return [_distance(*pair) for pair in zip(one.sums, other.sums, strict=True)]


def _others(result: MicrobatchResult) -> dict[str, Tensor]:
    """Return what a result holds for each sample, by name."""
    norms = {f"norms {index or ''}".strip(): norm for index, norm in enumerate(result.norms)}
    aux = {f"aux {index}": leaf for index, leaf in enumerate(tree_leaves(result.aux))}
    return {"losses": result.values, **norms, **aux}


def _distance(total: Tensor, expected: Tensor) -> float:
    if total.shape != expected.shape or total.dtype != expected.dtype:
        return float("inf")
    pieces = zip(total.flatten().split(_AT_ONCE), expected.flatten().split(_AT_ONCE), strict=True)
    distances = [torch.linalg.vector_norm((a - b.to(a.device)).double()) for a, b in pieces]
    return float(torch.linalg.vector_norm(torch.stack(distances)))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _slack_of(expected: Tensor, slack: float) -> Tensor:
    """Return how much each value may differ: nothing, if it is no floating-point number."""
    if not expected.is_floating_point():
        return torch.zeros(expected.shape, dtype=torch.float64, device=expected.device)
    values = expected.double().abs().nan_to_num(0.0, 0.0, 0.0)
    largest = values.max() if values.numel() else 0.0
    return slack * (values + largest)


def _is_close(found: Tensor, expected: Tensor, allowed: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    equal = (found == expected) | (found.isnan() & expected.isnan())
    near = (_wide(found) - _wide(expected)).abs() <= allowed
    return bool((equal | (near & (allowed > 0))).all())
