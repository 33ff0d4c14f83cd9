"""This module computes the signature for which a step is compiled; PyTorch's guards cover the Python of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from clipgrad.clipping import Clipping
from clipgrad.compiled.shape import is_channels_last
from clipgrad.engine.captured_loss import GraphOfLoss
from clipgrad.engine.inputs import Inputs
from clipgrad.errors import CompileError
from clipgrad.kernels.float32_precision import allows_bfloat16, precisions
from clipgrad.rules.registry import rules

_ATTRIBUTES = attrgetter("shape", "dtype", "device", "requires_grad", "layout")


READS = "something that the loss reads"
"""The part that also changes when PyTorch captures the loss again with symbols for lengths."""


def describe(tensor: Tensor) -> tuple[Any, ...]:
    """Return the properties of a tensor that a compiled graph depends on."""
    return _ATTRIBUTES(tensor), tensor.stride(), type(tensor)


def describe_all(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the properties of several tensors, column by column, which is faster."""
    return (
        tuple(map(_ATTRIBUTES, tensors)),
        tuple(map(Tensor.stride, tensors)),
        tuple(map(type, tensors)),
    )


def _describe_rows(leaf: Any) -> tuple[Any, ...]:
    """Return the properties of a batch leaf, whose rows are padded."""
    if isinstance(leaf, Tensor):
        return leaf.dim(), leaf.dtype, leaf.device, is_channels_last(leaf), type(leaf)
    return ("constant",)


def _global_settings(kinds: Sequence[str]) -> tuple[Any, ...]:
    """Return the global settings that change which operations run, or what they compute."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        # Without a mode it is the CPU; this call takes a third as long as all others together.
        torch.get_default_device() if _get_current_function_mode_stack() else torch.device("cpu"),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        *map(precisions, kinds),
        allows_bfloat16(),
        torch.is_anomaly_enabled(),
        (cudnn.enabled, cudnn.deterministic, cudnn.benchmark),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        cuda.cudnn_sdp_enabled(),
        torch.backends.mkldnn.enabled,
        torch._C._get_nnpack_enabled(),
    )


def signature(inputs: Inputs, loss: GraphOfLoss, clipping: Clipping) -> tuple[Any, ...]:
    """Equal for two batches exactly if one graph serves both, given that it serves their sizes.

    Args:
        inputs: The arguments.
        loss: The captured loss that PyTorch's guards chose.
        clipping: Of the transform; the norms themselves are inputs of the graph.
    """
    kinds = (
        ("cpu",) if inputs.params[0].device.type == "cpu" else ("cpu", inputs.params[0].device.type)
    )
    return (
        ("names of the parameters", tuple(inputs.names)),
        ("shape, dtype, device or requires_grad of a parameter", describe_all(inputs.params)),
        ("shape, dtype, device or layout of the batch", tuple(map(_describe_rows, inputs.batch))),
        (READS, loss.key),
        ("a tensor that the loss reads", describe_all(loss.tensors)),
        ("autocast, default dtype or device, determinism or precision settings", _global_settings(kinds)),
        ("clipping groups or rules, or a norm that became or was 0 or inf", clipping.structure),
        ("registered rules", tuple(rules().values())),
    )  # fmt: skip


def difference(now: tuple[Any, ...], was: tuple[Any, ...]) -> str | None:
    """Return which part of a signature has changed; None if none has."""
    if now == was:
        return None
    for (name, new), (_, old) in zip(now, was, strict=True):
        if new != old:
            return str(name)
    return None


def refuse_modes() -> None:
    """Refuse to compile inside a mode of the user, which would not see the operations of a compiled graph.

    Raises:
        CompileError: If such a mode is active.
    """
    active = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    active = [mode for mode in active if type(mode).__name__ != "DeviceContext"]
    if active:
        raise CompileError(
            f"a {type(active[0]).__name__} is active, which sees single operations; a compiled step has none. Call "
            "backward outside the mode, or leave compile out."
        )
