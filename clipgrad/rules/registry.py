"""What a rule is, and the table of all rules. Open to users: see ``register_rule``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from clipgrad._functorch import Decline
from clipgrad.rules.canonical import Use

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Extent:
    """The size of a use in the canonical layout; what the plan's cost model needs to know.

    Attributes:
        positions: Positions at which one sample uses the parameter.
        rows: Rows of the parameter, per group.
        columns: Columns of the parameter.
        groups: Blocks of rows with factors of their own.
        one_hot: Whether the left factor is one-hot (an embedding).
    """

    positions: int
    rows: int
    columns: int
    groups: int = 1
    one_hot: bool = False


@dataclass(frozen=True)
class Recipe:
    """How the use of one parameter is obtained once the gradient of the operation's output is known.

    Attributes:
        parameter: The operand as the rule received it.
        make: From the output gradient ``[B, ...]`` to the use.
        extent: Size in the canonical layout, or None if the per-sample gradient is cheap and always kept.
    """

    parameter: Tensor | None
    make: Callable[[Tensor], Use]
    extent: Extent | None = None


class Call(Protocol):
    """One intercepted call, as a rule sees it. Runs below ``vmap``: every tensor is physical."""

    @property
    def batch_size(self) -> int:
        """Samples in the microbatch, ``B``."""
        ...

    @property
    def randomness(self) -> str:
        """Whether samples draw ``"different"`` random numbers, the ``"same"``, or must not: ``"error"``."""
        ...

    def has_lanes(self, tensor: Tensor | None) -> bool:
        """Whether the operand differs from sample to sample."""
        ...

    def batched(self, tensor: Tensor) -> Tensor:
        """The operand with its sample axis first, ``[B, ...]``; broadcast if all samples share it."""
        ...

    def shared(self, tensor: Tensor) -> Tensor:
        """A parameter or constant that all samples share, detached.

        Raises:
            Decline: If the operand differs from sample to sample.
        """
        ...

    def adopt(self, tensor: Tensor) -> Tensor:
        """The parameter's stand-in, given the caller's own parameter tensor; any other operand unchanged.

        Computing with the caller's tensor is an error, since its gradient would escape. PyTorch itself keeps such
        a tensor in one known place, the flat weight list of a recurrent layer. There the exchange is safe: both
        stand for the same parameter and hold the same values, and the gradient is recorded under its name.
        """
        ...

    def record(self, output: Tensor, *recipes: Recipe, saved: tuple[Tensor, ...] = ()) -> Tensor:
        """Record uses as ``finish`` does, and go on computing with the physical tensor that this returns."""
        ...

    def finish(
        self,
        output: Tensor,
        *recipes: Recipe,
        saved: tuple[Tensor, ...] = (),
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Record the uses of this call's parameters and hand the output back to the user's code.

        Args:
            output: What the operation returned: a fresh tensor. (A view is copied first: were it written to in
                place later, autograd would route its gradient past the recipes.) Recipes receive a gradient of
                this shape.
            *recipes: One per parameter operand; recipes of constants and of None are ignored.
            saved: Tensors that the recipes close over; writing to them in place afterwards is an error.
            view: From ``output`` to the shape ``[B, ...]`` that user code expects, if they differ.
        """
        ...


@dataclass(frozen=True)
class Rule:
    """An exact, faster way to run one operation on all samples at once.

    Attributes:
        name: Shown by ``explain``.
        operations: The functions it intercepts, as ``__torch_function__`` sees them.
        apply: ``apply(call, *args, **kwargs)`` with the operation's own signature.
    """

    name: str
    operations: tuple[Callable[..., Any], ...]
    apply: Callable[..., Any]


@dataclass(frozen=True)
class Decomposition:
    """An operation rewritten in terms of others, which are then intercepted in turn."""

    name: str
    operations: tuple[Callable[..., Any], ...]
    apply: Callable[..., Any]


_RULES: dict[Callable[..., Any], Rule | Decomposition] = {}


def rules() -> Mapping[Callable[..., Any], Rule | Decomposition]:
    """A read-only view of every registered rule by operation."""
    return MappingProxyType(_RULES)


def _add(entry: Rule | Decomposition) -> None:
    if not entry.operations or not all(map(callable, entry.operations)):
        raise ValueError(
            "register_rule needs the functions to intercept, such as torch.nn.functional.linear, got "
            f"{entry.operations}."
        )
    for operation in entry.operations:
        if operation in _RULES:
            raise ValueError(
                f"register_rule: operation {getattr(operation, '__name__', operation)!r} already has the rule "
                f"{_RULES[operation].name!r}; call unregister_rule({getattr(operation, '__name__', operation)}) first."
            )
    for operation in entry.operations:
        _RULES[operation] = entry


def register_rule(*operations: Callable[..., Any], name: str) -> Callable[[F], F]:
    """Teach clipgrad an exact, faster way to run an operation on parameters.

    A rule is only ever an optimisation: without it the operation takes the exact fallback. The decorated
    function has the operation's own signature behind a leading ``call`` (see ``Call``). It runs the operation
    once on all samples and says, per parameter, how its per-sample gradient follows from the output gradient.
    It may raise ``Decline`` for arguments that it does not cover. Prove a rule with
    ``clipgrad.testing.assert_rule_matches_reference``.

    Args:
        *operations: Functions to intercept, as called by user code (``torch.nn.functional.linear``).
        name: Shown by ``explain``.

    Raises:
        ValueError: If an operation already has a rule, or is not a function.

    Examples:
        ``F.bilinear(x, z, W)`` is ``y_o = sum_ij x_i W_oij z_j``: rows of ``W`` are outputs, columns pairs of inputs.

        >>> import torch, clipgrad
        >>> import torch.nn.functional as F
        >>> from clipgrad.rules import Decline, Extent, Outer, Recipe
        >>> @clipgrad.rules.register_rule(F.bilinear, name="bilinear")
        ... def bilinear(call, input1, input2, weight, bias=None):
        ...     if bias is not None or not (call.has_lanes(input1) and call.has_lanes(input2)):
        ...         raise Decline  # the exact fallback takes over
        ...     x, z, w = call.batched(input1), call.batched(input2), call.shared(weight)
        ...     pairs = (
        ...         (x[..., :, None] * z[..., None, :]).flatten(-2).flatten(1, -2)
        ...     )  # [B, S, I*J]
        ...     y = F.bilinear(x, z, w)  # ordinary autograd finds the input gradients
        ...     recipe = Recipe(
        ...         weight,
        ...         lambda g: Outer(g.reshape(*pairs.shape[:2], -1), pairs, w.shape),
        ...         Extent(positions=pairs.shape[1], rows=w.shape[0], columns=pairs.shape[2]),
        ...     )
        ...     return call.finish(y, recipe, saved=(x, z))

        The proof: a use of the operation, compared with the definition in every way.

        >>> from clipgrad.testing import RuleCase, assert_rule_matches_reference
        >>> case = RuleCase(
        ...     "bilinear",
        ...     "plain",
        ...     lambda p, x: F.bilinear(x, x.sin(), p["w"]).cos().sum(),
        ...     params=lambda: {"w": torch.randn(2, 3, 3, dtype=torch.float64)},
        ...     batch=lambda size: (torch.randn(size, 3, dtype=torch.float64),),
        ... )
        >>> assert_rule_matches_reference(case)
        >>> clipgrad.rules.unregister_rule(F.bilinear).name
        'bilinear'
    """

    def decorate(function: F) -> F:
        _add(Rule(name, operations, function))
        return function

    return decorate


def register_decomposition(*operations: Callable[..., Any], name: str) -> Callable[[F], F]:
    """Rewrite an operation in terms of operations that have rules.

    The decorated function has the operation's own signature and returns its result; it runs under ``vmap``,
    as user code would. It may raise ``Decline``.
    """

    def decorate(function: F) -> F:
        _add(Decomposition(name, operations, function))
        return function

    return decorate


def unregister_rule(operation: Callable[..., Any]) -> Rule | Decomposition:
    """Forget the rule of one operation and return it; results stay the same, only slower.

    Raises:
        KeyError: If the operation has no rule.
    """
    return _RULES.pop(operation)


__all__ = [
    "Call",
    "Decline",
    "Decomposition",
    "Extent",
    "Recipe",
    "Rule",
    "register_decomposition",
    "register_rule",
    "rules",
    "unregister_rule",
]
