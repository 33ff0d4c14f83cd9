"""Uses of the normalisations: axes, layouts, and which of weight and bias is there and trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

CASES: list[RuleCase] = []
CHANNELS = (4,)


def case(
    rule: str,
    name: str,
    forward: Callable[..., Tensor],
    *shape: int,
    declines: bool = False,
    **shapes: Sequence[int],
) -> None:
    """Add a case; the parameters are the arguments of ``forward`` after the input, one per channel by default."""
    names = list(inspect.signature(forward).parameters)[1:]

    def params() -> dict[str, Tensor]:
        # Away from zero and one, at which mistakes would vanish.
        sizes = [shapes.get(name, CHANNELS) for name in names]
        drawn = [0.5 + torch.randn(*size, dtype=torch.float64) for size in sizes]
        return dict(zip(names, drawn, strict=True))

    def batch(size: int) -> tuple[Any, ...]:
        # Far from standardised, so that the statistics matter.
        x, target = torch.randn(2, size, *shape, dtype=torch.float64)
        return 1.5 + 2 * x, target

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        # Every output counts differently.
        return ((forward(x, **params) - target).sin() * target.exp()).sum()

    CASES.append(RuleCase(rule, name, loss, params, batch, declines))


def add(rule: str, *shape: int, **cases: Callable[..., Tensor]) -> None:
    """Add cases with inputs of one shape and one value per channel in every parameter."""
    for name, forward in cases.items():
        case(rule, name.replace("_", " "), forward, *shape)


FROZEN = torch.linspace(-1, 2, 4, dtype=torch.float64)
MEAN, VARIANCE = (
    torch.linspace(-0.7, 0.7, 4, dtype=torch.float64),
    torch.linspace(0.3, 1.7, 4, dtype=torch.float64),
)


def also_without_grad(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = F.layer_norm(x, CHANNELS, w, b)
    return F.layer_norm(x * scale, CHANNELS, w, b)


# --------------------------------------------------------------------- layer norm, RMS norm

add(
    "layer_norm", 5, 4,
    positional=lambda x, w, b: F.layer_norm(x, CHANNELS, w, b, 1e-3),
    keywords=lambda x, w, b: F.layer_norm(input=x, normalized_shape=[4], weight=w, bias=b),
    no_bias=lambda x, w: F.layer_norm(x, CHANNELS, w),
    bias_only=lambda x, b: F.layer_norm(x, CHANNELS, bias=b),
    frozen_weight=lambda x, b: F.layer_norm(x, CHANNELS, FROZEN, b),
    frozen_bias=lambda x, w: F.layer_norm(x, CHANNELS, w, FROZEN),
    one_parameter_as_weight_and_bias=lambda x, w: F.layer_norm(x, CHANNELS, w, w),
    used_twice=lambda x, w, b: F.layer_norm(F.layer_norm(x, CHANNELS, w, b).tanh() + x, CHANNELS, w, b),
    weight_computed_from_a_parameter=lambda x, w: F.layer_norm(x, CHANNELS, 1 + w.exp()),
    of_a_parameter=lambda x, w, b: F.layer_norm(w, CHANNELS, w, b) * F.layer_norm(x, CHANNELS, w, b),
    from_torch=lambda x, w, b: torch.layer_norm(x, CHANNELS, w, b),
    also_without_grad=also_without_grad,
)  # fmt: skip
case("layer_norm", "one position", lambda x, w, b: F.layer_norm(x, CHANNELS, w, b), 4)
case("layer_norm", "transposed input", lambda x, w, b: F.layer_norm(x.mT, CHANNELS, w, b).mT, 4, 5)
case(
    "layer_norm", "two normalised axes", lambda x, w, b: F.layer_norm(x, (3, 4), w, b), 2, 3, 4,
    w=(3, 4), b=(3, 4),
)  # fmt: skip
case(
    "layer_norm", "whole sample", lambda x, w, b: F.layer_norm(x, (3, 4), w, b), 3, 4,
    w=(3, 4), b=(3, 4),
)  # fmt: skip
case(
    "layer_norm", "layer below", lambda x, below, w, b: F.layer_norm((x @ below).tanh(), CHANNELS, w, b), 5, 4,
    below=(4, 4),
)  # fmt: skip
case(
    "layer_norm", "layer below, no affine", lambda x, below: F.layer_norm((x @ below).tanh(), CHANNELS), 5, 4,
    below=(4, 4),
)  # fmt: skip
case(
    "layer_norm", "weight computed from the sample", lambda x, w, b: F.layer_norm(x, CHANNELS, x[0, 0] * w, b), 5, 4,
    declines=True,
)  # fmt: skip

add(
    "rms_norm", 5, 4,
    default_eps=lambda x, w: F.rms_norm(x, CHANNELS, w),
    keywords=lambda x, w: F.rms_norm(input=x, normalized_shape=[4], weight=w, eps=0.1),
    used_twice=lambda x, w: F.rms_norm(F.rms_norm(x, CHANNELS, w).tanh() + x, CHANNELS, w),
)  # fmt: skip
case("rms_norm", "one position", lambda x, w: F.rms_norm(x, CHANNELS, w, 1e-3), 4)
case("rms_norm", "transposed input", lambda x, w: F.rms_norm(x.mT, CHANNELS, w).mT, 4, 5)
case("rms_norm", "two normalised axes", lambda x, w: F.rms_norm(x, (3, 4), w), 2, 3, 4, w=(3, 4))
case(
    "rms_norm", "layer below, no weight", lambda x, below: F.rms_norm((x @ below).tanh(), CHANNELS), 5, 4,
    below=(4, 4),
)  # fmt: skip

# ------------------------------------------------------- group, instance and batch norm

add(
    "group_norm", 4, 5,
    keywords=lambda x, w, b: F.group_norm(input=x, num_groups=2, weight=w, bias=b),
    one_channel_per_group=lambda x, w, b: F.group_norm(x, 4, w, b),
    no_bias=lambda x, w: F.group_norm(x, 2, w),
    frozen_weight=lambda x, b: F.group_norm(x, 2, FROZEN, b),
    frozen_bias=lambda x, w: F.group_norm(x, 2, w, FROZEN),
    used_twice=lambda x, w, b: F.group_norm(F.group_norm(x, 2, w, b).tanh() + x, 1, w, b),
    one_parameter_as_weight_and_bias=lambda x, w: F.group_norm(x, 2, w, w),
    from_torch=lambda x, w, b: torch.group_norm(x, 2, w, b),
)  # fmt: skip
case(
    "group_norm",
    "transposed output",
    lambda x, w, b: F.group_norm(x, 2, w, b).mT.contiguous().mT,
    4,
    5,
)
case("group_norm", "vectors", lambda x, w, b: F.group_norm(x, 2, w, b), 4)
case("group_norm", "image", lambda x, w, b: F.group_norm(x, 2, w, b, 1e-3), 4, 3, 5)
case("group_norm", "volume, one group", lambda x, w, b: F.group_norm(x, 1, w, b), 4, 2, 3, 2)
case(
    "group_norm",
    "several images per sample",
    lambda x, w, b: F.group_norm(x[0], 2, w, b)[None],
    3,
    4,
    5,
)
case(
    "group_norm", "layer below", lambda x, below, w, b: F.group_norm(F.conv1d(x, below, padding=1), 2, w, b), 4, 5,
    below=(4, 4, 3),
)  # fmt: skip

add(
    "instance_norm", 4, 5,
    positional=lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.1, 1e-2),
    running_statistics=lambda x, w, b: F.instance_norm(x, MEAN, VARIANCE, w, b, use_input_stats=False),
)  # fmt: skip
case(
    "instance_norm",
    "image",
    lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=1e-3),
    4,
    3,
    5,
)
case("instance_norm", "volume, no bias", lambda x, w: F.instance_norm(x, weight=w), 4, 2, 3, 2)
case(
    "instance_norm", "layer below, no affine", lambda x, below: F.instance_norm((x @ below).tanh()), 4, 5,
    below=(5, 5),
)  # fmt: skip

add(
    "batch_norm", 4, 5,
    keywords=lambda x, w, b: F.batch_norm(input=x, running_mean=MEAN, running_var=VARIANCE, weight=w, bias=b),
    bias_only=lambda x, b: F.batch_norm(x, MEAN, VARIANCE, bias=b),
    frozen_bias=lambda x, w: F.batch_norm(x, MEAN, VARIANCE, w, FROZEN),
)  # fmt: skip
case(
    "batch_norm",
    "vectors",
    lambda x, w, b: F.batch_norm(x, MEAN, VARIANCE, w, b, False, 0.1, 1e-2),
    4,
)
case(
    "batch_norm", "image", lambda x, w, b: F.batch_norm(x, MEAN, VARIANCE, w, b, eps=1e-3), 4, 3, 5
)
case(
    "batch_norm",
    "several images per sample",
    lambda x, w, b: F.batch_norm(x[0], MEAN, VARIANCE, w, b)[None],
    3,
    4,
    5,
)
case(
    "batch_norm", "layer below",
    lambda x, below, w, b: F.batch_norm(F.conv1d(x, below, padding=1), MEAN, VARIANCE, w, b), 4, 5,
    below=(4, 4, 3),
)  # fmt: skip
case(
    "batch_norm", "channels last",
    lambda x, w, b: F.batch_norm(x.movedim(-1, 1), MEAN, VARIANCE, w, b).movedim(1, -1), 3, 5, 4,
)  # fmt: skip
case(
    "instance_norm", "a weight that is expanded",
    lambda x, w: F.instance_norm(x, weight=w.expand(4), bias=w.expand(4)), 4, 5, w=(1,),
)  # fmt: skip
case(
    "group_norm", "a weight that is expanded",
    lambda x, w: F.group_norm(x, 2, w.expand(4), w.expand(4)), 4, 5, w=(1,),
)  # fmt: skip
case(
    "batch_norm", "one channel", lambda x, w, b: F.batch_norm(x, MEAN[:1], VARIANCE[:1], w, b),
    1, 5, w=(1,), b=(1,),
)  # fmt: skip
case(
    "instance_norm", "one channel, fixed statistics",
    lambda x, w: F.instance_norm(x, MEAN[:1], VARIANCE[:1], w, use_input_stats=False),
    1, 5, w=(1,),
)  # fmt: skip
