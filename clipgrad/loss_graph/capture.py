"""This module lets PyTorch capture the loss of one sample, and choose a graph by its guards at every call."""

from __future__ import annotations

import itertools
import logging
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RecompileError
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_flatten

from clipgrad.errors import NotPerSampleError
from clipgrad.kernels.float32_precision import inheritance_kept
from clipgrad.loss_graph.capture_settings import (
    GUARDS_ONLY,
    capture_settings,
    silence_pytorch,
)
from clipgrad.loss_graph.graph import (
    CapturedLoss,
    Place,
    forget_examples,
    make_pure,
    remove_unused_inputs,
)
from clipgrad.loss_graph.numbers import take_numbers
from clipgrad.loss_graph.reasons import CannotCapture, capture_error
from clipgrad.loss_graph.side_effects import refuse_side_effects, refuse_writes

GRAPHS = 16
"""The largest number of graphs of one loss: training and evaluation, a few lengths, a few values that change."""

_log = logging.getLogger("clipgrad")
_numbers = itertools.count()
# PyTorch's capture keeps state for the process, and two threads at once break it.
_ONE_AT_A_TIME = threading.RLock()
_PLAIN = (Tensor, torch.nn.Parameter)


class LossCapture:
    """This class holds the graphs of one loss. Each graph has guards of PyTorch.

    Args:
        fn: ``fn(*args) -> scalar``, or a pair of a scalar and a pytree of tensors.

    Examples:
        >>> import torch
        >>> from clipgrad.loss_graph import LossCapture
        >>> w, x = torch.ones(3, requires_grad=True), torch.ones(1, 3)
        >>> capture = LossCapture(lambda w, x: (x @ w).sum())
        >>> captured = capture.graph((w, x), [w], [x])
        >>> captured([2 * w], [x], captured.constants)[0].item()
        6.0
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._graphs: list[GraphModule] = []
        self._seen: dict[Any, int] = {}
        self._served: tuple[GraphModule, list[Any], dict[int, bool], list[Tensor], bool] | None = (
            None
        )
        self._guards_only = False
        self._call = torch.compile(_with_own_code(fn), backend=self._backend, fullgraph=True)

    def graph(
        self, args: Sequence[Any], parameters: Sequence[Tensor], leaves: Sequence[Any]
    ) -> CapturedLoss:
        """Return the graph for these arguments: an earlier graph if its guards hold, else a new graph.

        Call this method outside ``vmap`` and outside modes that see operations, with the autocast state in which the
        graph will run.

        Args:
            args: The arguments of the loss for one sample.
            parameters: Tensors that require grad. They are recognised by identity wherever the loss reads them.
            leaves: The tensors of the sample, which are recognised in the same way.

        Raises:
            CannotCapture: If PyTorch cannot capture the loss, or the loss changes too often.
            NotPerSampleError: If the loss uses a tensor that requires grad and is not a parameter.
        """
        if not all(parameter.requires_grad for parameter in parameters):
            raise ValueError("parameters must require grad; pass p.detach().requires_grad_().")
        with _ONE_AT_A_TIME:
            result = self._run(args)
            served, self._served = self._served, None
        if served is None:
            raise CannotCapture(
                "PyTorch captured no operation: the loss computes nothing, or torch.compile is switched off"
            )
        return self._captured(*served, result, parameters, leaves)

    def _run(self, args: Sequence[Any]) -> Any:
        """Evaluate the guards, and capture the loss if no graph has valid guards."""
        self._served = None
        self._guards_only = bool(self._graphs)
        reason = None
        with torch.enable_grad():
            if self._graphs:
                try:
                    with GUARDS_ONLY:
                        return self._call(_global_hooks(), *args)
                except RecompileError as error:
                    reason = _first_failed_guard(str(error))
                except Exception:
                    # PyTorch has no graph left, and would capture the loss under other settings than ours.
                    reason = "an object that it was captured with was deleted"
                finally:
                    self._guards_only = False
            if len(self._graphs) >= GRAPHS:
                raise CannotCapture(
                    f"it has {GRAPHS} graphs already, and a value that it reads changed again ({reason}); keep it "
                    "fixed, or make it a tensor"
                )
            _log.info("capturing the loss%s", f" again: {reason}" if reason else "")
            try:
                with silence_pytorch(), capture_settings(GRAPHS), inheritance_kept():
                    return self._call(_global_hooks(), *args)
            except Exception as error:
                raise capture_error(error) from error

    def _backend(self, module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Store a new graph. PyTorch calls this method as its backend; the loss itself never runs."""
        if self._guards_only:  # PyTorch deletes all graphs together with a model that they refer to
            raise RuntimeError("no graph is left")
        changes = refuse_side_effects()
        module = make_pure(module)
        numbers = take_numbers(module)
        refuse_writes(module)
        kept = remove_unused_inputs(module)
        places = module.graph.find_nodes(op="placeholder")
        lifted = {index: numbers[place] for index, place in enumerate(places) if place in numbers}
        forget_examples(module)
        self._graphs.append(module)
        (output,) = module.graph.find_nodes(op="output")
        # One tensor per output, because the outputs that the loss returned are recognised by identity.
        outputs = [torch.zeros(()) for _ in output.args[0]]

        def served(*inputs: Any) -> list[Tensor]:
            taken = [inputs[position] for position in kept]
            for index in lifted:
                taken[index] = float(taken[index])
            self._served = module, taken, lifted, outputs, changes
            return outputs

        return served

    def _captured(
        self,
        module: GraphModule,
        inputs: list[Any],
        numbers: dict[int, bool],
        outputs: list[Tensor],
        changes: bool,
        result: Any,
        parameters: Sequence[Tensor],
        leaves: Sequence[Any],
    ) -> CapturedLoss:
        known = {id(value): Place("leaf", i) for i, value in enumerate(leaves)}
        known |= {id(value): Place("parameter", i) for i, value in enumerate(parameters)}
        constants: list[Tensor | int | float] = []
        lifted = set()
        places = []
        for index, value in enumerate(inputs):
            place = known.get(id(value))
            if place is None or not isinstance(value, Tensor):
                place = Place("constant", len(constants))
                constants.append(_check_constant(value))
                if numbers.get(index):
                    lifted.add(place.index)
            known.setdefault(id(value), place)
            places.append(place)
        known |= {id(value): Place("output", i) for i, value in enumerate(outputs)}
        results, aux = _results(result, known, outputs)
        key = (self._graphs.index(module), tuple(places), results, aux)
        number = self._seen.setdefault(key, len(self._seen))
        return CapturedLoss(
            module,
            number,
            tuple(places),
            results,
            aux,
            constants,
            changes,
            frozenset(lifted),
        )


def _with_own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``fn`` in a function with a new code object, because PyTorch stores graphs and lengths per code object."""

    def loss(hooks: str, *args: Any) -> Any:
        return fn(*args) if hooks != "none" else None  # read, so that PyTorch guards its value

    name = f"loss_of_one_sample_{next(_numbers)}"
    code = loss.__code__.replace(co_name=name)
    return types.FunctionType(code, globals(), name, None, loss.__closure__)


def _global_hooks() -> str:
    """Return the global module hooks as text, because PyTorch has no guard for hooks that are added later."""
    module = torch.nn.modules.module
    return ",".join(
        str(id(hook))
        for hooks in (
            module._global_forward_pre_hooks,
            module._global_forward_hooks,
            module._global_backward_pre_hooks,
            module._global_backward_hooks,
        )
        for hook in hooks.values()
    )


def _check_constant(value: Any) -> Tensor | int | float:
    if isinstance(value, int | float):
        return value
    if type(value) not in _PLAIN:
        raise CannotCapture(f"it reads a {type(value).__name__}, which is not an ordinary tensor")
    if value.requires_grad:
        raise NotPerSampleError(
            f"the loss uses a tensor of shape {tuple(value.shape)} that requires grad and is not among the parameters, "
            "so its gradient would not be clipped. Train it with the others, or freeze it with requires_grad_(False), "
            "also if the loss uses it under torch.no_grad() only."
        )
    tensor: Tensor = value
    return tensor


def _results(
    result: Any, known: dict[int, Place], outputs: list[Tensor]
) -> tuple[tuple[Place, ...], TreeSpec | None]:
    """Return the places of the loss and of the auxiliary leaves.

    Raises:
        CannotCapture: If the graph computes something that is not returned.
    """
    aux = None
    values = [result]
    if isinstance(result, tuple) and len(result) == 2:
        leaves, aux = tree_flatten(result[1])
        values = [result[0], *leaves]
    if not isinstance(values[0], Tensor):
        raise CannotCapture(
            f"it returns {type(values[0]).__name__}; it must return a tensor, or a pair (tensor, aux)"
        )
    results = tuple(known.get(id(value), Place("value", value)) for value in values)
    returned = {place.index for place in results if place.kind == "output"}
    if len(returned) != len(outputs):
        raise CannotCapture("it computes and stores values that it does not return")
    return results, aux


def _first_failed_guard(text: str) -> str:
    """Return PyTorch's description of the first guard that failed, in one line."""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("- "):
            return line[2:]
    return text.strip().splitlines()[-1].strip()
