"""Run a checkpointed region and keep only its inputs; the backward pass runs it again and records the uses then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad._functorch import (
    Decline,
    below_vmap,
    current_level,
    expose_batch_axis,
    hide_batch_axis,
    vmap_level,
)
from clipgrad.engine.capture import Capture
from clipgrad.engine.escapes import refuse_escapes
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.engine.tracked import Tracked
from clipgrad.errors import NotPerSampleError

_CHANGED = (
    "a checkpointed region (torch.utils.checkpoint) changes one of its inputs in place, so running it again in the "
    "backward pass would change the input twice. Use the out-of-place operation: x = x * 2 instead of x *= 2."
)


@dataclass(frozen=True)
class _Argument:
    """This class holds an argument of a region.

    Attributes:
        value: The argument itself if all samples share it, the physical tensor of a per-sample value, or the
            ``Tracked`` entry of a parameter.
        kind: ``"shared"``, ``"sample"`` or ``"tracked"``, in this order.
    """

    value: Any
    kind: str


@dataclass(eq=False)
class _Region:
    """This class holds what a second run of a region needs.

    Attributes:
        capture: Capture of the forward pass.
        body: The region's function.
        arguments: Arguments in order. Per-sample arguments have no value here, since autograd saves them.
        chosen: Positions of the outputs that can receive a gradient.
        derived: Entries of the expressions of parameters that the first run made.
        autocast: Enters the autocast of the first run.
        generators: RNG state before the first run; None if the region draws no random numbers.
        outputs: Outputs of the first run, until ``_Recomputed`` returns them.
    """

    capture: Capture
    body: Callable[..., Any]
    arguments: list[_Argument]
    chosen: list[int]
    derived: list[Tracked]
    autocast: Callable[[], AbstractContextManager[Any]]
    generators: SavedRngState | None
    outputs: list[Tensor] = field(default_factory=list)

    def again(
        self, samples: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Run the region again with a graph, and then its backward pass, in which the rules' hooks record uses.

        Args:
            samples: Per-sample inputs of the region, as physical tensors.
            gradients: Output gradients of the chosen outputs.

        Returns:
            The gradient of each tensor in ``samples``.
        """
        tape = self.capture.tape
        inputs = _cut(samples)
        known = len(tape.tracked)
        replayed = (
            nullcontext() if self.generators is None else self.generators.temporarily_restored()
        )
        with (
            torch.enable_grad(),
            self.autocast(),
            replayed,
            vmap_level(tape.batch_size, self.capture.randomness) as level,
        ):
            capture = self.capture.again()
            args = _given(self.arguments, inputs, capture)
            with capture:
                found = self.body(*args)
            outputs = [expose_batch_axis(found[position], level) for position in self.chosen]
        # The first run chose the norm methods. Both runs make the expressions of parameters in the same order.
        for old, new in zip(self.derived, tape.tracked[known:], strict=True):
            new.strategy = old.strategy
        reached = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output is not None and gradient is not None
        ]
        refuse_escapes(tape, [output for output, _ in reached], capture.parameters, inputs)
        torch.autograd.backward(
            [output for output, _ in reached], [gradient for _, gradient in reached]
        )
        return [value.grad for value in inputs]


class _Recomputed(torch.autograd.Function):
    """This function returns the outputs of a region's first run; its backward pass runs the region again."""

    @staticmethod
    def forward(ctx: Any, region: _Region, anchor: Tensor, *samples: Tensor) -> tuple[Tensor, ...]:
        ctx.region = region
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*samples)
        outputs, region.outputs = region.outputs, []
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, None, *ctx.region.again(ctx.saved_tensors, gradients)


def checkpointed(capture: Capture, body: Callable[..., Any], draws: bool, *args: Any) -> Any:
    """Run a region whose body is a pure function of its arguments.

    A region that cannot run again runs once, like any other part of the loss, and saves no memory. That is so inside of
    another transform, and for a traced region that draws random numbers, since a graph cannot restore RNG state.
    """
    arguments = _arguments(capture, args)
    traced = draws and get_proxy_mode() is not None
    if arguments is None or traced or not torch.is_grad_enabled():
        with capture:
            return body(*args)
    tape = capture.tape
    samples = [argument.value for argument in arguments if argument.kind == "sample"]
    generators = SavedRngState(tape.anchor.device) if draws else None
    autocast = _autocast_now(tape.anchor.device.type)
    known, versions = len(tape.tracked), [sample._version for sample in samples]
    with below_vmap():
        inputs = _cut(samples)
    left = iter(inputs)
    given = [
        hide_batch_axis(next(left), capture.level) if argument.kind == "sample" else arg
        for argument, arg in zip(arguments, args, strict=True)
    ]
    # This run counts uses for the choice of norm methods, which needs gradients. Its graph is dropped.
    with capture:
        outputs = list(body(*given))
    if [sample._version for sample in samples] != versions:
        raise NotPerSampleError(_CHANGED)
    chosen, values = _reached(capture, outputs)
    if not chosen:
        return tuple(outputs)
    region = _Region(
        capture,
        body,
        [_Argument(None, "sample") if a.kind == "sample" else a for a in arguments],
        chosen,
        tape.tracked[known:],
        autocast,
        generators,
        values,
    )
    del values
    with below_vmap():
        results = _Recomputed.apply(region, tape.anchor, *samples)
    for position, result in zip(chosen, results, strict=True):
        outputs[position] = hide_batch_axis(result, capture.level)
    return tuple(outputs)


def _arguments(capture: Capture, args: Sequence[Any]) -> list[_Argument] | None:
    """Return the arguments with their kinds, or None if an argument belongs to another transform."""
    if current_level() != capture.level:
        return None
    found = []
    for arg in args:
        if not isinstance(arg, Tensor):
            found.append(_Argument(arg, "shared"))
            continue
        entry = capture.table.get(id(arg))
        if entry is not None:
            found.append(_Argument(entry, "tracked"))
            continue
        try:
            value = expose_batch_axis(arg, capture.level)
        except Decline:
            return None
        found.append(_Argument(arg, "shared") if value is None else _Argument(value, "sample"))
    return found


def _cut(samples: Sequence[Tensor]) -> list[Tensor]:
    """Return the same values as leaves of a new graph."""
    return [sample.detach().requires_grad_(sample.requires_grad) for sample in samples]


def _given(arguments: Sequence[_Argument], inputs: Sequence[Tensor], capture: Capture) -> list[Any]:
    """Return the arguments at the vmap level of ``capture``, and add parameters to the capture's table.

    The caller keeps them alive while the capture is in use, since the table finds tensors by identity.
    """
    left = iter(inputs)
    given = []
    for argument in arguments:
        value = argument.value
        if argument.kind == "sample":
            value = hide_batch_axis(next(left), capture.level)
        elif argument.kind == "tracked":
            value = hide_batch_axis(argument.value.leaf, capture.level)
            capture.table[id(value)] = argument.value
        given.append(value)
    return given


def _reached(capture: Capture, outputs: Sequence[Any]) -> tuple[list[int], list[Tensor]]:
    """Return positions and physical values of the per-sample outputs that require grad."""
    chosen, values = [], []
    for position, output in enumerate(outputs):
        if not isinstance(output, Tensor) or id(output) in capture.table:
            continue  # An expression of parameters has an entry in the table.
        value = expose_batch_axis(output, capture.level)
        if value is not None and value.requires_grad:
            chosen.append(position)
            values.append(value)
    return chosen, values


def _autocast_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that enters the autocast that holds now."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    cache = torch.is_autocast_cache_enabled()
    if not enabled:
        return nullcontext
    return lambda: torch.autocast(device, dtype=dtype, cache_enabled=cache)
