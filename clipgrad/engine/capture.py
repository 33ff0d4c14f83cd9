"""Intercept every operation of the loss, recognise parameters among its operands, and run a rule if there is one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.overrides import TorchFunctionMode, resolve_name

from clipgrad._functorch import (
    Decline,
    below_vmap,
    current_level,
    current_randomness,
    expose_batch_axis,
)
from clipgrad.engine import custom_vmap, stale_values
from clipgrad.engine.call import BoundCall
from clipgrad.engine.error_messages import written_expression_message, written_message
from clipgrad.engine.escapes import escape_message
from clipgrad.engine.expressions import (
    SHAREABLE,
    VIEWS,
    is_injective,
    writes_in_place,
    writes_to_first,
)
from clipgrad.engine.fallback import CORRECTIONS
from clipgrad.engine.foreign_code import PLAIN, dispatch_modes, refuse_dispatch_modes, refuse_kind
from clipgrad.engine.one_by_one import retry_one_by_one
from clipgrad.engine.tape import Tape
from clipgrad.engine.tracked import Tracked
from clipgrad.engine.whole_tensors import WholeTensors, is_harmless, whole_tensor_error
from clipgrad.errors import EscapedParameterError, NotPerSampleError
from clipgrad.kernels.region import run_region
from clipgrad.rules.registry import Decomposition, Rule, rules

_RULES = rules()
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def operation_name(function: Callable[..., Any]) -> str:
    name: str = resolve_name(function) or getattr(function, "__name__", repr(function))
    return name.removeprefix("torch.").replace("nn.functional.", "F.")


def operands(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield every tensor among the arguments, also from lists and tuples."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from operands(value, {})


def tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, list | tuple) else []


class Capture(TorchFunctionMode):
    """This mode intercepts the operations of one forward pass under ``vmap``.

    Args:
        tape: The microbatch's tape.
        wrappers: The tensor that the loss holds for each parameter, in the tape's order.
        originals: The parameter tensors that the caller passed; if the loss computes with one, its gradient would
            escape clipping.
        run_checkpointed: What runs a checkpointed region: it receives this capture and the region's arguments.
        whole: Tensors of the whole batch, which the loss must not read.
    """

    def __init__(
        self,
        tape: Tape,
        wrappers: Sequence[Tensor],
        originals: Sequence[Tensor],
        run_checkpointed: Callable[..., Any],
        whole: WholeTensors,
    ) -> None:
        super().__init__()
        self.tape = tape
        self._run_checkpointed, self.whole = run_checkpointed, whole
        self.level = current_level()
        self.randomness = current_randomness()
        self.modes = dispatch_modes()
        self.table: dict[int, Tracked] = {}
        for tracked, wrapper in zip(tape.tracked, wrappers, strict=True):
            tracked.wrapper = wrapper
            self.table[id(wrapper)] = tracked
        self.originals = {id(t): name.name for t, name in zip(originals, tape.tracked, strict=True)}
        self.positions = {id(t): index for index, t in enumerate(originals)}
        # An id identifies an object only while the object is alive.
        self.parameters = list(originals)
        self._kept_alive = list(wrappers)
        self.made: list[weakref.ref[Tensor]] = []

    def again(self) -> Capture:
        """A capture for another run of a part of this loss, at the level of ``vmap`` that is active now."""
        twin = copy.copy(self)
        twin.level, twin.modes = current_level(), dispatch_modes()
        twin.table, twin.made = {}, []
        return twin

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func == _REQUIRES_GRAD:
            return self._requires_grad(args[0])
        if func is run_region:
            return self._run_checkpointed(self, *args)
        if types or dispatch_modes() != self.modes:
            refuse_dispatch_modes()
            for kind in types:
                refuse_kind(kind, f"an operand of {operation_name(func)}")
        kept = stale_values.contains_stale(operands(args, kwargs), self.level)
        try:
            result = self._run(func, args, kwargs)
        except Exception as error:
            if kept:
                raise stale_values.stale_value_error(operation_name(func)) from error
            raise
        made = tensors_in(result)
        if kept and made:  # reading a shape is harmless
            raise stale_values.stale_value_error(operation_name(func))
        self.made.extend(map(weakref.ref, made))
        return result

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        native = current_level() == self.level
        if native:
            rule = _RULES.get(func)
            if rule is not None and "out" not in kwargs and "self" not in kwargs:
                result = self._apply(rule, args, kwargs)
                if result is not NotImplemented:
                    return result
        tracked, foreign, whole = self._classify(args, kwargs)
        if whole is not None and not is_harmless(func):
            raise whole_tensor_error(whole, operation_name(func))
        if tracked and not foreign and native and func in SHAREABLE and torch.is_grad_enabled():
            result = self._derive(func, args, kwargs, tracked)
            if result is not NotImplemented:
                return result
        if tracked and writes_to_first(func) and id(args[0]) in self.table:
            # Refuse before the call: some calls succeed, and the parameter would be changed before an error is raised.
            entry = self.table[id(args[0])]
            message = written_expression_message if entry.derived else written_message
            raise NotPerSampleError(message(entry.name))
        result = self._under_vmap(func, args, kwargs)
        if custom_vmap.has_custom_vmap(func, args):
            backward_pass = any(map(self._requires_grad, tensors_in(result)))
            if backward_pass or not native:  # an inner transform may run a backward pass of its own
                raise custom_vmap.custom_vmap_error(func, args)
        if tracked and torch.is_grad_enabled() and tensors_in(result):
            for entry in tracked:
                entry.fallback.append(operation_name(func))
        if foreign and self.originals:
            self._check_originals(func, args, kwargs, result)
        return result

    def _under_vmap(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        correction = CORRECTIONS.get(func)
        try:
            if correction is None:
                return func(*args, **kwargs)
            before = _get_sequence_nr()
            result = correction(*args, **kwargs)
            self.tape.corrected.append((before, _get_sequence_nr()))
            return result
        except (RuntimeError, IndexError, ValueError) as error:
            return retry_one_by_one(func, args, kwargs, error)

    def _requires_grad(self, tensor: Tensor) -> bool:
        """Return whether a tensor requires grad below ``vmap``, which hides this from a loss that branches on it."""
        if tensor.requires_grad:
            return True
        try:
            value = expose_batch_axis(tensor, self.level)
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
            call = BoundCall(self, rule.name)
            before = _get_sequence_nr()
            with below_vmap():
                result = rule.apply(call, *args, **kwargs)
            self.tape.corrected.append((before, _get_sequence_nr()))
            call.check()
            return result
        except Decline:
            return NotImplemented

    def _classify(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Tracked], bool, Tensor | None]:
        """Return the tracked operands, whether there are other tensors, and one of the whole batch if there is one."""
        found: list[Tracked] = []
        foreign, whole = False, None
        for operand in operands(args, kwargs):
            entry = self.table.get(id(operand))
            if entry is None:
                foreign = True
                if id(operand) in self.whole:
                    whole = operand
                if type(operand) not in PLAIN:
                    refuse_kind(type(operand), "a tensor that the loss computes with")
            else:
                found.append(entry)
        return found, foreign, whole

    def _derive(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        sources: list[Tracked],
    ) -> Any:
        """Run an operation on parameters alone once for all samples, and track its result."""

        def run(read: Callable[[Tracked], Tensor]) -> Any:
            lowered = [_replace_tracked(value, self.table, read) for value in args]
            return func(
                *lowered,
                **{key: _replace_tracked(value, self.table, read) for key, value in kwargs.items()},
            )

        if writes_in_place(func, args, kwargs):
            return NotImplemented
        source = sources[0]
        with below_vmap():
            result = run(lambda entry: entry.shared)
            outputs = tensors_in(result)
            if not outputs or not all(output.requires_grad for output in outputs):
                return NotImplemented
            wide: list[Tensor | None] = [None] * len(outputs)
            if len(sources) == 1 and source.injective and func in VIEWS:
                same = source.exact is source.shared
                twins = outputs if same else tensors_in(run(lambda entry: entry.exact))
                wide = [
                    twin if is_injective(func, source.shared, output) else None
                    for output, twin in zip(outputs, twins, strict=True)
                ]
            name = f"{operation_name(func)}({', '.join(source.name for source in sources)})"
            wrapped = []
            for output, twin in zip(outputs, wide, strict=True):
                entry = self.tape.derive(name, output, sources, self.level, twin)
                self.table[id(entry.wrapper)] = entry
                wrapped.append(entry.wrapper)
        if isinstance(result, Tensor):
            return wrapped[0]
        return type(result)(wrapped) if type(result) in (list, tuple) else tuple(wrapped)

    def refuse_whole(self, tensor: Tensor, operation: str) -> None:
        if id(tensor) in self.whole:
            raise whole_tensor_error(tensor, operation)

    def refuse_original(self, tensor: Tensor, operation: str) -> None:
        name = self.originals.get(id(tensor))
        if name is not None:
            raise EscapedParameterError(escape_message(name, operation))

    def _check_originals(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Refuse originals among the operands if the result requires grad; reading a shape is harmless."""
        if any(tensor.requires_grad for tensor in tensors_in(result)):
            for operand in operands(args, kwargs):
                self.refuse_original(operand, operation_name(func))


def _replace_tracked(
    value: Any, table: dict[int, Tracked], read: Callable[[Tracked], Tensor]
) -> Any:
    """Return an argument in which ``read`` replaces every tracked tensor."""
    # This is not a nested function: a recursive closure is a reference cycle and would keep the whole tape alive.
    if isinstance(value, Tensor):
        return read(table[id(value)])
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        return type(value)(_replace_tracked(item, table, read) for item in value)
    return value
