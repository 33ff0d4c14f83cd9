"""PyTorch captures the loss of one sample; its guards say at every call which graph serves."""

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
from clipgrad.loss_graph.capture_settings import (
    GUARDS_ONLY,
    capture_settings,
    quiet,
)
from clipgrad.loss_graph.graph import CapturedLoss, Place, forget_examples, pure, without_unused
from clipgrad.loss_graph.numbers import take_numbers
from clipgrad.loss_graph.reasons import CannotCapture, explained
from clipgrad.loss_graph.side_effects import refuse_side_effects, refuse_writes

GRAPHS = 16
"""How many graphs one loss may have: training and evaluation, a few lengths, a few values that change."""

_log = logging.getLogger("clipgrad")
_numbers = itertools.count()
# PyTorch's capture keeps state for the process, and two threads at once break it.
_ONE_AT_A_TIME = threading.RLock()
_PLAIN = (Tensor, torch.nn.Parameter)


class LossCapture:
    """The graphs of one loss, each of which PyTorch guards.

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
        self._served: tuple[GraphModule, list[Any], dict[int, bool], list[Tensor]] | None = None
        self._guards_only = False
        self._call = torch.compile(_of_its_own(fn), backend=self._backend, fullgraph=True)

    def graph(
        self, args: Sequence[Any], parameters: Sequence[Tensor], leaves: Sequence[Any]
    ) -> CapturedLoss:
        """The graph that serves these arguments: one of before if PyTorch's guards hold, else a new one.

        Call it outside of ``vmap`` and of modes that see operations; autocast must be as it is where the graph runs.

        Args:
            args: The arguments of the loss for one sample.
            parameters: Tensors that require grad, known by identity wherever the loss finds them.
            leaves: The tensors of the sample, likewise.

        Raises:
            CannotCapture: If PyTorch cannot capture the loss, or it changes too often.
            NotPerSampleError: If the loss uses a tensor that requires grad and is no parameter.
        """
        if not all(parameter.requires_grad for parameter in parameters):
            raise ValueError("parameters must require grad; pass p.detach().requires_grad_().")
        with _ONE_AT_A_TIME:
            result = self._run(args)
            served, self._served = self._served, None
        if served is None:
            raise CannotCapture(
                "PyTorch captured no operation of it; it computes nothing, or torch.compile is switched off"
            )
        return self._captured(*served, result, parameters, leaves)

    def _run(self, args: Sequence[Any]) -> Any:
        """Evaluate the guards; capture where they say so."""
        self._served = None
        self._guards_only = bool(self._graphs)
        reason = None
        with torch.enable_grad():
            if self._graphs:
                try:
                    with GUARDS_ONLY:
                        return self._call(_global_hooks(), *args)
                except RecompileError as error:
                    reason = _changed(str(error))
                except Exception:
                    # PyTorch forgot every graph, and captures under settings that are not ours.
                    reason = "what it was captured with exists no more"
                finally:
                    self._guards_only = False
            if len(self._graphs) >= GRAPHS:
                raise CannotCapture(
                    f"it has {GRAPHS} graphs already, and something that it reads changed again ({reason}); keep it "
                    "fixed, or make it a tensor"
                )
            _log.info("capturing the loss%s", f" again: {reason}" if reason else "")
            try:
                with quiet(), capture_settings(GRAPHS):
                    return self._call(_global_hooks(), *args)
            except Exception as error:
                raise explained(error) from error

    def _backend(self, module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """What PyTorch calls with a new graph; the loss itself is never run."""
        if self._guards_only:  # PyTorch forgot every graph, with a model that was deleted
            raise RuntimeError("no graph is left")
        refuse_side_effects()
        module = pure(module)
        numbers = take_numbers(module)
        refuse_writes(module)
        kept = without_unused(module)
        places = module.graph.find_nodes(op="placeholder")
        lifted = {index: numbers[place] for index, place in enumerate(places) if place in numbers}
        forget_examples(module)
        self._graphs.append(module)
        (output,) = module.graph.find_nodes(op="output")
        # Not one for all: which of them the loss returned is told by identity.
        outputs = [torch.zeros(()) for _ in output.args[0]]

        def served(*inputs: Any) -> list[Tensor]:
            taken = [inputs[position] for position in kept]
            for index in lifted:
                taken[index] = float(taken[index])
            self._served = module, taken, lifted, outputs
            return outputs

        return served

    def _captured(
        self,
        module: GraphModule,
        inputs: list[Any],
        numbers: dict[int, bool],
        outputs: list[Tensor],
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
                constants.append(_constant(value))
                if numbers.get(index):
                    lifted.add(place.index)
            known.setdefault(id(value), place)
            places.append(place)
        known |= {id(value): Place("output", i) for i, value in enumerate(outputs)}
        results, aux = _results(result, known, outputs)
        key = (self._graphs.index(module), tuple(places), results, aux)
        number = self._seen.setdefault(key, len(self._seen))
        return CapturedLoss(
            module, number, tuple(places), results, aux, constants, frozenset(lifted)
        )


def _of_its_own(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` as a function with code of its own, to which PyTorch ties graphs and what it knows of lengths."""

    def loss(hooks: str, *args: Any) -> Any:
        return fn(*args) if hooks != "none" else None  # read, so that PyTorch guards its value

    name = f"loss_of_one_sample_{next(_numbers)}"
    code = loss.__code__.replace(co_name=name)
    return types.FunctionType(code, globals(), name, None, loss.__closure__)


def _global_hooks() -> str:
    """Which hooks there are on all modules; PyTorch captures them but has no guard that sees a later one."""
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


def _constant(value: Any) -> Tensor | int | float:
    if isinstance(value, int | float):
        return value
    if type(value) not in _PLAIN:
        raise CannotCapture(f"it takes in {type(value).__name__}, which is no ordinary tensor")
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
    """Where the loss and the leaves beside it come from.

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
            f"it returns {type(values[0]).__name__} where a tensor, or a pair of one and more, is needed"
        )
    results = tuple(known.get(id(value), Place("value", value)) for value in values)
    returned = {place.index for place in results if place.kind == "output"}
    if len(returned) != len(outputs):
        raise CannotCapture(
            "the graph returns more than the loss does: something else is computed and stored"
        )
    return results, aux


def _changed(text: str) -> str:
    """What PyTorch says of the first guard that failed, in one line."""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("- "):
            return line[2:]
    return text.strip().splitlines()[-1].strip()
