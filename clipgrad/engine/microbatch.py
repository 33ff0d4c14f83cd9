"""This module runs one microbatch: forward pass under ``vmap``, ordinary backward pass, norms, clipped sums."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from clipgrad._functorch import expected, expose_or_broadcast, hide_batch_axis, vmap_level
from clipgrad._phases import phase
from clipgrad.engine import foreign_code, stale_values
from clipgrad.engine.capture import Capture
from clipgrad.engine.clip_and_sum import (
    MicrobatchResult,
    Settings,
    clip,
)
from clipgrad.engine.error_messages import explain_vmap_errors, written_message
from clipgrad.engine.escapes import refuse_escapes
from clipgrad.engine.gradients import Gradients
from clipgrad.engine.inputs import Loss
from clipgrad.engine.norm_method import Choice, choose
from clipgrad.engine.recompute import checkpointed
from clipgrad.engine.tape import Tape
from clipgrad.engine.whole_tensors import WholeTensors
from clipgrad.errors import NotPerSampleError


def forward(
    loss: Loss,
    names: Sequence[str],
    params: Sequence[Tensor],
    batch: Sequence[Any],
    settings: Settings,
    whole: WholeTensors,
) -> tuple[Tape, Tensor, Any]:
    """Run the loss on all samples at once and record the uses of the parameters.

    Args:
        loss: The loss of one sample.
        names: Names of the parameters.
        params: The parameters.
        batch: Rows of one microbatch.
        settings: The resolved options.
        whole: Tensors of the whole batch, which the loss must not read.
    """
    foreign_code.refuse_modes()
    foreign_code.refuse_saved_tensors_hooks()
    size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
    tape = Tape(names, params, size, settings.ranks.before_recipe)

    versions = [param._version for param in params]
    made: list[weakref.ref[Tensor]] = []
    try:
        with (
            explain_vmap_errors(),
            foreign_code.without_saved_tensors_hooks(),
            vmap_level(size, settings.options.performance.randomness) as level,
        ):
            leaves = [hide_batch_axis(entry.leaf, level) for entry in tape.tracked]
            rows = [
                hide_batch_axis(leaf, level) if isinstance(leaf, Tensor) else leaf for leaf in batch
            ]
            capture = Capture(tape, leaves, params, checkpointed, whole)
            made = capture.made
            value, aux, structure = _one_sample(loss, capture, leaves, rows, settings)
            values = expose_or_broadcast(value, level, size)
            aux = [expose_or_broadcast(leaf, level, size).detach() for leaf in aux]
        for name, param, version in zip(names, params, versions, strict=True):
            if param._version != version:
                raise NotPerSampleError(written_message(name))
    except BaseException:
        stale_values.remember(made)  # the loss may have stored values before it failed
        tape.release()
        raise
    del leaves, rows, value, capture  # these references must not count as stored values
    stale_values.remember(made)
    return tape, values, tree_unflatten(aux, structure)


def _one_sample(
    loss: Loss, capture: Capture, leaves: list[Tensor], sample: list[Any], settings: Settings
) -> tuple[Tensor, list[Tensor], TreeSpec]:
    """Return the loss of one sample, its auxiliary tensors and their structure."""
    if settings.options.keep_batch_dim:
        sample = [leaf[None] if isinstance(leaf, Tensor) else leaf for leaf in sample]
    capture.made.extend(weakref.ref(leaf) for leaf in sample if isinstance(leaf, Tensor))
    with capture:
        result = loss(leaves, sample)
    value, aux = value_and_aux(result, settings.options.has_aux)
    flat, structure = tree_flatten(aux)
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            raise NotPerSampleError(
                f"aux may hold tensors only, got {type(leaf).__name__}. Return (loss, metrics) with metrics that are "
                "tensors of the one sample, and keep constants outside the loss."
            )
    return value, flat, structure


def run(
    loss: Loss,
    names: Sequence[str],
    params: Sequence[Tensor],
    batch: Sequence[Any],
    is_padding: Tensor | None,
    settings: Settings,
    whole: WholeTensors,
) -> MicrobatchResult:
    """Run forward and backward pass of one microbatch, and compute norms and clipped sums; see ``forward``."""
    with phase("forward"), torch.enable_grad():
        tape, values, aux = forward(loss, names, params, batch, settings, whole)
    try:
        with phase("forward"):
            choose_strategies(tape, settings)
        if settings.ranks.is_sharded:
            settings.ranks.before_backward([values.grad_fn, *tape.graphs_of_expressions()])
        with torch.enable_grad():
            _backward(tape, values, params)
        with torch.no_grad(), _without_autocast(values.device):
            with phase("per-sample gradients"):
                gradients = Gradients(tape)
            with phase("norms"):
                return clip(gradients, values.detach(), aux, is_padding, settings)
    finally:
        tape.release()


def choose_strategies(tape: Tape, settings: Settings) -> list[Choice]:
    """Choose a strategy for every tracked entry, and store it in the entry."""
    choices = choose(
        tape.tracked,
        expected(tape.batch_size),
        strategy=settings.strategy,
        memory_budget=settings.options.performance.memory_budget,
    )
    for entry, choice in zip(tape.tracked, choices, strict=True):
        entry.strategy = choice.strategy
    return choices


def value_and_aux(result: Any, has_aux: bool | None) -> tuple[Tensor, Any]:
    """Return what a loss returned as the loss and what is beside it; refuse what is no loss."""
    if has_aux is None:
        has_aux = isinstance(result, tuple) and len(result) == 2
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
            "to return more, return (loss, metrics) to DPOptimizer, or use clipgrad.clipped_grad with has_aux=True."
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
    refuse_escapes(tape, [values], params)
    with phase("backward"), _without_autocast(values.device), explain_vmap_errors():
        values.sum().backward()


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch the caller's autocast off, so that norms and sums keep their precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
