"""One microbatch: forward under ``vmap``, one ordinary backward, norms, clipped sums."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from clipgrad import _leftovers
from clipgrad._advice import explained
from clipgrad._branches import Disagreement, rows
from clipgrad._capture import Capture, escape_message, written_message
from clipgrad._gradients import Gradients
from clipgrad._plan import Choice, choose
from clipgrad._tape import Strategy, Tape
from clipgrad.clipping import Clipping
from clipgrad.errors import EscapedParameterError, NotPerSampleError
from clipgrad.rules._canonical import PerSample, row_norms_squared, select_rows

PreClipping = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Settings:
    """What a microbatch needs to know of the transform's configuration."""

    clipping: Clipping
    dtypes: tuple[torch.dtype, ...]
    randomness: str
    keep_batch_dim: bool
    has_aux: bool
    nan_safe: bool
    strategy: Strategy | None
    memory_budget: float | None
    pre_clipping: PreClipping | None
    branches: str = "refuse"


@dataclass(frozen=True)
class Piece:
    """The result of one microbatch.

    Attributes:
        sums: Clipped sum per parameter, in the accumulation dtype.
        values: Per-sample losses ``[B]``.
        norms: Per-sample norms, ``[B]`` per clipping group.
        aux: Per-sample auxiliary output, or None.
        nonfinite: Boolean ``[B]``: samples dropped because their gradient was not finite.
    """

    sums: list[Tensor]
    values: Tensor
    norms: list[Tensor]
    aux: Any
    nonfinite: Tensor


Loss = Callable[[Sequence[Tensor], Sequence[Any]], Any]


def forward(
    loss: Loss,
    names: Sequence[str],
    params: Sequence[Tensor],
    batch: Sequence[Any],
    settings: Settings,
) -> tuple[Tape, Tensor, Any]:
    """Run the loss on every sample at once and record the uses of the parameters."""
    size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
    tape = Tape(names, params, size)

    structure: list[Any] = []
    made: list[list[weakref.ref[Tensor]]] = []

    def one_sample(leaves: list[Tensor], sample: list[Any]) -> tuple[Tensor, ...]:
        if settings.keep_batch_dim:
            sample = [leaf[None] if isinstance(leaf, Tensor) else leaf for leaf in sample]
        capture = Capture(tape, leaves, params, splits=settings.branches == "split")
        made.append(capture.made)
        capture.made.extend(weakref.ref(leaf) for leaf in sample if isinstance(leaf, Tensor))
        with capture:
            result = loss(leaves, sample)
        value, aux = _split(result, settings.has_aux)
        flat, spec = tree_flatten(aux)
        for leaf in flat:
            if not isinstance(leaf, Tensor):
                raise NotPerSampleError(
                    f"aux may hold tensors only, got {type(leaf).__name__}; return constants outside the loss."
                )
        structure.append(spec)
        return value, *flat

    in_dims = ([0] * len(params), [0 if isinstance(leaf, Tensor) else None for leaf in batch])
    versions = [param._version for param in params]
    try:
        with explained():
            values, *aux = vmap(one_sample, in_dims=in_dims, randomness=settings.randomness)(
                [entry.leaf for entry in tape.tracked], list(batch)
            )
        for name, param, version in zip(names, params, versions, strict=True):
            if param._version != version:
                raise NotPerSampleError(written_message(name))
    except BaseException:
        tape.release()
        raise
    _leftovers.remember(made[0])
    return tape, values, tree_unflatten([leaf.detach() for leaf in aux], structure[0])


def run(
    loss: Loss,
    names: Sequence[str],
    params: Sequence[Tensor],
    batch: Sequence[Any],
    is_padding: Tensor | None,
    settings: Settings,
) -> Piece:
    """Clipped sums of one microbatch; where samples branch apart, of its parts."""
    try:
        with torch.enable_grad():
            tape, values, aux = forward(loss, names, params, batch, settings)
    except Disagreement as disagreement:
        parts = disagreement.parts()
    else:
        return _finish(tape, values, aux, params, is_padding, settings)
    pieces = [
        run(
            loss,
            names,
            params,
            rows(batch, part),
            None if is_padding is None else is_padding[part.to(is_padding.device)],
            settings,
        )
        for part in parts
    ]
    return _joined(pieces, torch.cat(parts).argsort())


def _joined(pieces: Sequence[Piece], order: Tensor) -> Piece:
    """The pieces of one microbatch as one, samples in their old order."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(parts))
        return joined[order.to(joined.device)]

    sums = [total.contiguous() for total in pieces[0].sums]
    for piece in pieces[1:]:
        torch._foreach_add_(sums, piece.sums)
    return Piece(
        sums,
        join([piece.values for piece in pieces]),
        [join(norms) for norms in zip(*(piece.norms for piece in pieces), strict=True)],
        tree_map(lambda *leaves: join(leaves), *(piece.aux for piece in pieces)),
        join([piece.nonfinite for piece in pieces]),
    )


def _finish(
    tape: Tape,
    values: Tensor,
    aux: Any,
    params: Sequence[Tensor],
    is_padding: Tensor | None,
    settings: Settings,
) -> Piece:
    """Backward pass, norms and clipped sums after the forward pass of one microbatch."""
    try:
        plan(tape, settings)
        with torch.enable_grad():
            _backward(tape, values, params)
        with torch.no_grad(), _without_autocast(values.device):
            gradients = Gradients(tape, len(params))
            return _clip(gradients, params, values.detach(), aux, is_padding, settings)
    finally:
        tape.release()


def plan(tape: Tape, settings: Settings) -> list[Choice]:
    """Decide a strategy for every tracked entry, and tell the entries."""
    forced = Strategy.KEPT if settings.pre_clipping is not None else settings.strategy
    choices = choose(
        tape.tracked, tape.batch_size, strategy=forced, memory_budget=settings.memory_budget
    )
    for entry, choice in zip(tape.tracked, choices, strict=True):
        entry.strategy = choice.strategy
    return choices


def _split(result: Any, has_aux: bool) -> tuple[Tensor, Any]:
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise NotPerSampleError(
                f"has_aux=True needs the loss to return (loss, aux), got {type(result).__name__}."
            )
        value, aux = result
    else:
        value, aux = result, ()
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = (
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise NotPerSampleError(
            f"the loss must return a scalar tensor for one sample, got {got}. Reduce it with .mean() or .sum(); "
            "to return more, use clipgrad.clipped_grad with has_aux=True."
        )
    if not value.is_floating_point():
        raise NotPerSampleError(
            f"the loss must be a floating-point scalar, got {value.dtype}; compute it from floating-point values."
        )
    return value, aux


def _backward(tape: Tape, values: Tensor, params: Sequence[Tensor]) -> None:
    if not values.requires_grad:
        raise NotPerSampleError(
            "the loss does not depend on any parameter that is being trained (detached, computed under no_grad or "
            "inference_mode, or made of other tensors), so there is no gradient to clip. "
            "Compute the loss from the model's output, and let the gradient through."
        )
    _refuse_escapes(tape, values, params)
    with _without_autocast(values.device), explained():
        values.sum().backward()


def _refuse_escapes(tape: Tape, values: Tensor, params: Sequence[Tensor]) -> None:
    """Walk the graph that is about to run: a leaf that is not ours would receive an unclipped gradient.

    The capture sees operations; this sees what reached the graph by any other road (a custom
    ``autograd.Function``, a C++ extension).
    """
    ours = {id(entry.leaf) for entry in tape.tracked} | {id(tape.anchor)}
    seen = set()
    stack = [values.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in ours:
            for entry, original in zip(tape.tracked, params, strict=False):
                if variable is original:
                    raise EscapedParameterError(escape_message(entry.name, "the loss"))
            raise EscapedParameterError(
                f"the loss depends on a tensor of shape {tuple(variable.shape)} that requires grad and is not "
                "among the parameters, so its gradient would escape clipping. Pass it with the parameters, "
                "register it in the model, or detach it."
            )
        stack.extend(following for following, _ in node.next_functions)


def _clip(
    gradients: Gradients | _Transformed,
    params: Sequence[Tensor],
    values: Tensor,
    aux: Any,
    is_padding: Tensor | None,
    settings: Settings,
) -> Piece:
    clipping = settings.clipping
    indices = range(len(params))
    if settings.pre_clipping is not None:
        assert isinstance(gradients, Gradients)
        gradients = _Transformed(
            settings.pre_clipping([gradients.per_sample(index) for index in indices])
        )
    squared = [gradients.squared_norms(index) for index in indices]
    norms = [
        _total([squared[index] for index in clipping.members(group)], values).sqrt()
        for group in range(len(clipping.groups))
    ]
    finite = torch.stack(norms).isfinite().all(0)
    keep = finite if is_padding is None else finite & ~is_padding
    factors = [clipping.factors(norm, group) for group, norm in enumerate(norms)]
    if settings.nan_safe or is_padding is not None:
        keep = keep if settings.nan_safe else ~is_padding  # type: ignore[operator]
        factors = [torch.where(keep, factor, 0.0) for factor in factors]
        if not bool(finite.all()):
            # A zero factor does not silence an inf; such samples are taken out of the factors themselves.
            gradients.select(keep)
    sums = []
    for index, (param, dtype) in enumerate(zip(params, settings.dtypes, strict=True)):
        total = gradients.weighted_sum(index, factors[clipping.assignment[index]])
        sums.append(torch.zeros_like(param, dtype=dtype) if total is None else total.to(dtype))
    nonfinite = ~finite if is_padding is None else ~finite & ~is_padding
    return Piece(sums, values, norms, aux, nonfinite)


class _Transformed:
    """Per-sample gradients after ``pre_clipping_transform``; the materialised twin of ``Gradients``."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients

    def squared_norms(self, index: int) -> Tensor:
        return row_norms_squared(self._gradients[index])

    def weighted_sum(self, index: int, factors: Tensor) -> Tensor:
        return PerSample(self._gradients[index]).weighted_sum(factors)

    def select(self, keep: Tensor) -> None:
        self._gradients = [select_rows(gradient, keep) for gradient in self._gradients]


def _total(squared: Sequence[Tensor | None], values: Tensor) -> Tensor:
    present = [norm for norm in squared if norm is not None]
    if not present:
        wide = torch.promote_types(values.dtype, torch.float32)
        return torch.zeros_like(values, dtype=wide)
    return torch.stack(present).sum(0) if len(present) > 1 else present[0]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Norms and sums keep their precision whatever the caller's autocast says."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
