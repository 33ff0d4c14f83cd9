"""See every operation of the loss, recognise the parameters in it, and run a rule where one exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from clipgrad._lanes import (
    Decline,
    below_vmap,
    current_level,
    current_randomness,
    per_sample,
    physical,
)
from clipgrad._shared import SHAREABLE, is_injective
from clipgrad._tape import Expected, Tape, Tracked, watch
from clipgrad.errors import EscapedParameterError
from clipgrad.rules._registry import Decomposition, Recipe, Rule, rules
from clipgrad.rules.fallback import CORRECTIONS

_RULES = rules()
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def operation_name(function: Callable[..., Any]) -> str:
    name: str = resolve_name(function) or getattr(function, "__name__", repr(function))
    return name.removeprefix("torch.").replace("nn.functional.", "F.")


def operands(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor among the arguments, lists and tuples of tensors included."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from operands(value, {})


def tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, list | tuple) else []


class BoundCall:
    """The ``Call`` that a rule receives: operands of one operation, resolved against the tape."""

    def __init__(self, capture: Capture, rule: str) -> None:
        self._capture = capture
        self._rule = rule

    @property
    def batch_size(self) -> int:
        return self._capture.tape.batch_size

    @property
    def randomness(self) -> str:
        return self._capture.randomness

    def has_lanes(self, tensor: Tensor | None) -> bool:
        if tensor is None or id(tensor) in self._capture.table:
            return False
        return physical(tensor, self._capture.level) is not None

    def batched(self, tensor: Tensor) -> Tensor:
        tracked = self._capture.table.get(id(tensor))
        if (
            tracked is not None
        ):  # a parameter used as data: its per-sample copies carry the gradient
            tracked.fallback.append(self._rule)
            return tracked.leaf
        value = physical(tensor, self._capture.level)
        if value is not None:
            return value
        return tensor.expand(self.batch_size, *tensor.shape)

    def shared(self, tensor: Tensor) -> Tensor:
        self._capture.refuse_original(tensor, self._rule)
        tracked = self._capture.table.get(id(tensor))
        if tracked is not None:
            return tracked.value
        if physical(tensor, self._capture.level) is not None:
            raise Decline
        return tensor

    def finish(
        self,
        output: Tensor,
        *recipes: Recipe,
        saved: tuple[Tensor, ...] = (),
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        entries: list[tuple[Tracked, Expected]] = []
        if torch.is_grad_enabled():
            for recipe in recipes:
                if recipe.parameter is None:
                    continue
                tracked = self._capture.table.get(id(recipe.parameter))
                if tracked is not None:
                    entries.append((tracked, Expected(self._rule, recipe)))
        if entries:
            for tracked, expected in entries:
                tracked.expected.append(expected)
            tape = self._capture.tape
            output = watch(output, tape.anchor, tape.on_gradient(entries, saved, self._rule))
        return per_sample(output if view is None else view(output), self._capture.level)


class Capture(TorchFunctionMode):
    """Intercepts the operations of one forward pass under ``vmap``.

    Args:
        tape: The microbatch's tape.
        wrappers: What the loss holds for each parameter, in the tape's order.
        originals: The tensors that the caller passed; met inside the loss, they are a gradient that escapes.
    """

    def __init__(self, tape: Tape, wrappers: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
        super().__init__()
        self.tape = tape
        self.level = current_level()
        self.randomness = current_randomness()
        self.table: dict[int, Tracked] = {}
        for tracked, wrapper in zip(tape.tracked, wrappers, strict=True):
            tracked.wrapper = wrapper
            self.table[id(wrapper)] = tracked
        self.originals = {id(t): name.name for t, name in zip(originals, tape.tracked, strict=True)}
        self._kept_alive = (
            list(wrappers),
            list(originals),
        )  # an id is only an identity while its object lives

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        native = current_level() == self.level
        if func == _REQUIRES_GRAD:
            return self._requires_grad(args[0])
        if native:
            rule = _RULES.get(func)
            if rule is not None:
                result = self._apply(rule, args, kwargs)
                if result is not NotImplemented:
                    return result
        tracked, foreign = self._classify(args, kwargs)
        if tracked and not foreign and native and func in SHAREABLE and torch.is_grad_enabled():
            result = self._derive(func, args, kwargs, tracked)
            if result is not NotImplemented:
                return result
        result = CORRECTIONS.get(func, func)(*args, **kwargs)
        if tracked and torch.is_grad_enabled() and tensors_in(result):
            for entry in tracked:
                entry.fallback.append(operation_name(func))
        if foreign and self.originals:
            self._check_originals(func, args, kwargs, result)
        return result

    def _requires_grad(self, tensor: Tensor) -> bool:
        """``vmap`` hides that autograd records below it; a loss that asks must get the true answer."""
        if tensor.requires_grad:
            return True
        try:
            value = physical(tensor, self.level)
        except Decline:
            return False
        return value is not None and value.requires_grad

    def _apply(
        self, rule: Rule | Decomposition, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        try:
            if isinstance(rule, Decomposition):
                with self:
                    return rule.apply(*args, **kwargs)
            with below_vmap():
                return rule.apply(BoundCall(self, rule.name), *args, **kwargs)
        except Decline:
            return NotImplemented

    def _classify(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Tracked], bool]:
        """The tracked operands, and whether there is any other tensor among the operands."""
        found: list[Tracked] = []
        foreign = False
        for operand in operands(args, kwargs):
            entry = self.table.get(id(operand))
            if entry is None:
                foreign = True
            else:
                found.append(entry)
        return found, foreign

    def _derive(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        sources: list[Tracked],
    ) -> Any:
        """Run an operation on parameters alone once, and track its result."""

        def lower(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.table[id(value)].shared
            if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
                return type(value)(lower(item) for item in value)
            return value

        with below_vmap():
            result = func(*map(lower, args), **{key: lower(value) for key, value in kwargs.items()})
            outputs = tensors_in(result)
            if not outputs or not all(output.requires_grad for output in outputs):
                return NotImplemented
            name = f"{operation_name(func)}({', '.join(source.name for source in sources)})"
            wrapped = []
            for output in outputs:
                injective = len(sources) == 1 and is_injective(func, sources[0].shared, output)
                entry = self.tape.derive(name, output, sources, self.level, injective)
                self.table[id(entry.wrapper)] = entry
                wrapped.append(entry.wrapper)
        if isinstance(result, Tensor):
            return wrapped[0]
        return type(result)(wrapped) if type(result) in (list, tuple) else tuple(wrapped)

    def refuse_original(self, tensor: Tensor, operation: str) -> None:
        name = self.originals.get(id(tensor))
        if name is not None:
            raise EscapedParameterError(escape_message(name, operation))

    def _check_originals(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Reading a shape is harmless; computing with an original is a gradient that escapes."""
        if any(tensor.requires_grad for tensor in tensors_in(result)):
            for operand in operands(args, kwargs):
                self.refuse_original(operand, operation_name(func))


def escape_message(name: str, operation: str) -> str:
    return (
        f"parameter {name!r} reached {operation} from outside the transform (held in a list, a closure or an "
        "attribute that is not a registered parameter), so its gradient would escape clipping. Read it through "
        "the model or the params argument inside the loss: register it as nn.Parameter or in nn.ParameterList."
    )


__all__ = ["BoundCall", "Capture", "escape_message", "operation_name"]
