"""This module defines rules and holds the table of all rules; users add rules with ``register_rule``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from clipgrad._functorch import Decline as Decline
from clipgrad.rules.canonical import Use

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Extent:
    """This class holds the size of a use in the canonical layout, for the plan's cost model.

    Attributes:
        positions: Number of positions at which one sample uses the parameter.
        rows: Rows of the parameter per group.
        columns: Columns of the parameter.
        groups: Number of blocks of rows with separate factors.
        one_hot: Whether the left factor is one-hot (an embedding).
    """

    positions: int
    rows: int
    columns: int
    groups: int = 1
    one_hot: bool = False


@dataclass(frozen=True)
class Recipe:
    """This class describes how to obtain the use of one parameter from the operation's output gradient.

    Attributes:
        parameter: The operand as the rule received it.
        make: Function from the output gradient ``[B, ...]`` to the use.
        extent: Size in the canonical layout, or None if the per-sample gradient is cheap and always kept.
    """

    parameter: Tensor | None
    make: Callable[[Tensor], Use]
    extent: Extent | None = None


class Call(Protocol):
    """This protocol represents one intercepted call to a rule, which runs below ``vmap`` on physical tensors."""

    @property
    def batch_size(self) -> int:
        """Return the number of samples in the microbatch, ``B``."""
        ...

    @property
    def randomness(self) -> str:
        """Return whether random numbers are ``"different"`` or the ``"same"`` per sample, or an ``"error"``."""
        ...

    def has_batch_axis(self, tensor: Tensor | None) -> bool:
        """Return whether the operand differs from sample to sample."""
        ...

    def batched(self, tensor: Tensor) -> Tensor:
        """Return the operand with its sample axis first, ``[B, ...]``; a shared operand is broadcast."""
        ...

    def shared(self, tensor: Tensor) -> Tensor:
        """Return a parameter or constant that all samples share, detached.

        Raises:
            Decline: If the operand differs from sample to sample.
        """
        ...

    def adopt(self, tensor: Tensor) -> Tensor:
        """Replace the caller's own parameter tensor by the parameter's stand-in; return other operands unchanged.

        Computing with the caller's tensor is an error, because its gradient would escape clipping. PyTorch keeps such
        a tensor in one known place: the flat weight list of a recurrent layer. The exchange is safe there, because
        both tensors hold the values of the same parameter and the gradient is recorded under the parameter's name.
        """
        ...

    def record(self, output: Tensor, *recipes: Recipe, saved: tuple[Tensor, ...] = ()) -> Tensor:
        """Record uses as ``finish`` does, and return the physical tensor with which the rule must continue."""
        ...

    def finish(
        self,
        output: Tensor,
        *recipes: Recipe,
        saved: tuple[Tensor, ...] = (),
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Record the uses of this call's parameters and return the output for the user's code.

        Args:
            output: Fresh tensor that the operation returned; recipes receive a gradient of its shape. A view is
                copied first: after a later in-place write, autograd would route its gradient past the recipes.
            *recipes: One recipe per parameter operand; recipes of constants and of None are ignored.
            saved: Tensors that the recipes close over; writing to them in place afterwards is an error.
            view: Function from ``output`` to the shape ``[B, ...]`` that user code expects, if the shapes differ.
        """
        ...


@dataclass(frozen=True)
class Rule:
    """This class holds an exact, faster way to run one operation on all samples at once.

    Attributes:
        name: Name that ``explain`` shows.
        operations: Intercepted functions, as ``__torch_function__`` receives them.
        apply: Function ``apply(call, *args, **kwargs)`` with the operation's own signature after ``call``.
    """

    name: str
    operations: tuple[Callable[..., Any], ...]
    apply: Callable[..., Any]


@dataclass(frozen=True)
class Decomposition:
    """This class holds an operation rewritten in terms of other operations, which are then intercepted."""

    name: str
    operations: tuple[Callable[..., Any], ...]
    apply: Callable[..., Any]


_RULES: dict[Callable[..., Any], Rule | Decomposition] = {}


def rules() -> Mapping[Callable[..., Any], Rule | Decomposition]:
    """Return a read-only view of all registered rules, keyed by operation."""
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
    """Register an exact, faster way to run an operation on parameters.

    A rule is only an optimisation: without a rule the operation runs in the exact fallback. The decorated function
    has the operation's own signature after a leading ``call`` (see ``Call``). It runs the operation once on all
    samples and passes a recipe for each parameter to ``call.finish``. It may raise ``Decline`` for arguments that it
    does not cover. Test a rule with ``clipgrad.testing.assert_rule_matches_reference``.

    Args:
        *operations: Functions to intercept, as called by user code (``torch.nn.functional.linear``).
        name: Name that ``explain`` shows.

    Raises:
        ValueError: If an operation already has a rule, or is not a function.

    Examples:
        ``F.bilinear(x, z, W)`` is ``y_o = sum_ij x_i W_oij z_j``: rows of ``W`` are outputs, columns input pairs.

        >>> import torch, clipgrad
        >>> import torch.nn.functional as F
        >>> from clipgrad.rules import Decline, Extent, Outer, Recipe
        >>> @clipgrad.rules.register_rule(F.bilinear, name="bilinear")
        ... def bilinear(call, input1, input2, weight, bias=None):
        ...     if bias is not None or not (
        ...         call.has_batch_axis(input1) and call.has_batch_axis(input2)
        ...     ):
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

        The test compares a use of the operation with the reference definition.

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

    The decorated function has the operation's own signature. It runs under ``vmap``, and may raise ``Decline``.
    """

    def decorate(function: F) -> F:
        _add(Decomposition(name, operations, function))
        return function

    return decorate


def unregister_rule(operation: Callable[..., Any]) -> Rule | Decomposition:
    """Remove and return the rule of one operation; results stay the same and become slower.

    Raises:
        KeyError: If the operation has no rule.
    """
    return _RULES.pop(operation)
