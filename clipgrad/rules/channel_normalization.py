"""This module has rules for group, instance and eval-mode batch normalisation, with one weight and bias per channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad._functorch import is_symbol
from clipgrad.batch_norm import batch_norm_error
from clipgrad.errors import NotPerSampleError
from clipgrad.rules.canonical import PerSample
from clipgrad.rules.names import functional_aten_names_of
from clipgrad.rules.normalization import (
    Statistics,
    is_autocast_on,
    shared_or_none,
    statistics_or_none,
)
from clipgrad.rules.operands import widen
from clipgrad.rules.registry import Call, Decline, Recipe, register_rule


class _ChannelAffine:
    """This class finds per-sample gradients of one weight and bias per channel.

    A group norm over ``B * C`` channels of one image equals the group norm of ``B`` samples, but its affine gradients
    are per sample. So one native operation finds them, at the cost of the ordinary weight gradient. The input ``x`` is
    ``[N, C, *positions]`` with ``N = B * n``, and ``statistics`` maps it to ``N * groups`` values each.
    """

    def __init__(self, x: Tensor, samples: int, statistics: Callable[[Tensor], Statistics]) -> None:
        self.x = x
        self._samples = samples
        self._statistics = statistics
        self._bias: Tensor | None = None

    def weight(self, gradient: Tensor) -> PerSample:
        x = widen(self.x)
        rows, channels = x.shape[:2]
        # Statistics may be expanded, and the native operation reads its operands as if they were contiguous.
        mean, rstd = (
            value.reshape(1, -1).to(x.dtype).contiguous() for value in self._statistics(x)
        )
        image = (1, rows * channels, x[0, 0].numel())
        # Reshape may return a view that is not contiguous.
        gradient, x = (value.reshape(image).contiguous() for value in (widen(gradient), x))
        if is_symbol(rows):  # the native operation makes a number of it
            groups = (-1, 1, 1), (mean.shape[1], -1, image[2])
            whole = (x.view(groups[1]) - mean.view(groups[0])) * rstd.view(groups[0])
            weight, bias = (gradient * whole.view(image)).sum(2), gradient.sum(2)
        else:
            _, weight, bias = torch.ops.aten.native_group_norm_backward(
                gradient, x, mean, rstd, x.new_ones(1).expand(image[1]), *image, mean.shape[1], [False, True, True],
            )  # fmt: skip
        self._bias = self._per_sample(bias)
        return PerSample(self._per_sample(weight))

    def bias(self, gradient: Tensor) -> PerSample:
        """Return the bias gradient, which ``weight`` has already computed if it ran before."""
        found, self._bias = self._bias, None
        if found is None:
            summed = gradient.flatten(2).sum(2, dtype=widen(gradient[:0]).dtype)
            found = self._per_sample(summed)
        return PerSample(found)

    def _per_sample(self, values: Tensor) -> Tensor:
        return values.reshape(self._samples, -1, self.x.shape[1]).sum(1)


def _images(call: Call, input: Tensor) -> tuple[Tensor, torch.Size]:
    """Return the input as ``[N, C, *positions]``, contiguous or channels last, and the input's original shape."""
    if not call.has_batch_axis(input):
        raise Decline
    x = call.batched(input)
    if x.dim() < 3 or not x.numel():
        raise Decline
    images = x.flatten(0, 1)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(images.dim())
    if channels_last is None or not images.is_contiguous(memory_format=channels_last):
        images = images.contiguous()
    return images, x.shape


def _shared(
    call: Call, affine: tuple[Tensor | None, Tensor | None], channels: int
) -> list[Tensor | None]:
    """Return weight and bias of shape ``(channels,)``; PyTorch accepts other shapes if there is one channel."""
    if any(operand is not None and operand.shape != (channels,) for operand in affine):
        raise Decline
    shared = (shared_or_none(call, operand) for operand in affine)
    # The native operation reads weights as if they were contiguous; an expanded weight is not.
    return [None if operand is None else operand.contiguous() for operand in shared]


def _group_norm(
    call: Call,
    images: Tensor,
    shape: torch.Size,
    groups: int,
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> Tensor:
    w, b = _shared(call, affine, images.shape[1])
    rows, channels, positions = *images.shape[:2], images[0, 0].numel()
    statistics: Statistics | None = None
    if is_autocast_on(images) or not images.is_contiguous():
        y = F.group_norm(images, groups, w, b, eps)
    else:
        y, mean, rstd = torch.native_group_norm(
            images, w, b, rows, channels, positions, groups, eps
        )
        statistics = statistics_or_none(mean, rstd)

    def find(wide: Tensor) -> Statistics:
        if statistics is not None:
            return statistics
        mean, rstd = torch.native_group_norm(
            wide.contiguous(), None, None, rows, channels, positions, groups, eps
        )[1:]
        return mean, rstd

    return _finish(call, y, shape, affine, _ChannelAffine(images, shape[0], find))


@register_rule(
    F.group_norm, torch.group_norm, *functional_aten_names_of("group_norm"), name="group_norm"
)
def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Run group norm, with statistics per sample and group of channels over all positions."""
    images, shape = _images(call, input)
    # PyTorch refuses one value per group, and a number of groups that does not divide the channels.
    if images[0].numel() * shape[1] <= num_groups or shape[2] % num_groups:
        raise Decline
    return _group_norm(call, images, shape, num_groups, (weight, bias), eps)


@register_rule(F.instance_norm, name="instance_norm")
def instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Run instance norm: a group norm with one group per channel, or an affine map if statistics are fixed."""
    if not use_input_stats:
        return _fixed_statistics(call, input, running_mean, running_var, (weight, bias), eps)
    if running_mean is not None or running_var is not None:
        raise NotPerSampleError(
            "InstanceNorm with track_running_stats=True writes its running statistics (buffers) in the "
            "forward pass, unclipped and without noise, which is not private. Make it with "
            "track_running_stats=False, or put it in eval mode: module.eval()."
        )
    images, shape = _images(call, input)
    if images[0, 0].numel() == 1:  # PyTorch refuses this call with its own message
        raise Decline
    return _group_norm(call, images, shape, shape[2], (weight, bias), eps)


@register_rule(F.batch_norm, name="batch_norm")
def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Run eval-mode batch norm, an affine map per channel; training mode has no per-sample gradients and is refused."""
    if running_mean is None or running_var is None:
        raise batch_norm_error("without running statistics", trained=False)
    if training:
        raise batch_norm_error("in training mode")
    return _fixed_statistics(call, input, running_mean, running_var, (weight, bias), eps)


def _fixed_statistics(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> Tensor:
    if running_mean is None or running_var is None:
        raise Decline  # PyTorch refuses this call with its own message
    if running_mean.requires_grad or running_var.requires_grad:
        raise Decline  # this rule does not compute gradients of the statistics
    images, shape = _images(call, input)
    mean, variance = call.shared(running_mean), call.shared(running_var)
    w, b = _shared(call, affine, images.shape[1])
    # Positions are flattened to one axis: with two axes, PyTorch 2.13's input gradient is wrong on CPU if the output
    # gradient is channels last and the input is not.
    rows = images.flatten(2) if images.dim() > 3 else images
    y = F.batch_norm(rows, mean, variance, w, b, eps=eps)

    def find(wide: Tensor) -> Statistics:
        rstd = (variance.to(wide.dtype) + eps).rsqrt()
        return mean.expand(wide.shape[0], -1), rstd.expand(wide.shape[0], -1)

    return _finish(call, y, shape, affine, _ChannelAffine(images, shape[0], find))


def _finish(
    call: Call,
    y: Tensor,
    shape: torch.Size,
    affine: tuple[Tensor | None, Tensor | None],
    gradients: _ChannelAffine,
) -> Tensor:
    recipes = Recipe(affine[0], gradients.weight), Recipe(affine[1], gradients.bias)
    # ``_fixed_statistics`` flattens the positions of images to one axis.
    return call.finish(y, *recipes, saved=(gradients.x,), view=lambda y: y.view(shape))
