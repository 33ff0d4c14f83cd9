"""Normalisation layers, their affine parameters, and other elementwise parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, floats, freeze, normal


def norm(name: str, make: Callable[[], nn.Module], *shape: int, why: str) -> None:
    """Register one normalisation layer on inputs of this shape."""
    add(
        name, lambda: nn.Sequential(make(), nn.Tanh(), nn.Linear(shape[-1], 2)), floats(*shape), why
    )


norm("layer_norm", lambda: nn.LayerNorm(4), 5, 4, why="weight and bias, shared over time")
norm("layer_norm_2d", lambda: nn.LayerNorm(4), 4, why="one position per sample")
norm("layer_norm_no_bias", lambda: nn.LayerNorm(4, bias=False), 5, 4, why="weight only")
norm(
    "layer_norm_no_affine",
    lambda: nn.LayerNorm(4, elementwise_affine=False),
    5,
    4,
    why="no parameters in the norm itself",
)
norm("layer_norm_multi_axis", lambda: nn.LayerNorm((3, 4)), 2, 3, 4, why="two normalised axes")
norm(
    "layer_norm_whole_sample", lambda: nn.LayerNorm((5, 4)), 5, 4, why="no shared position is left"
)
norm("rms_norm", lambda: nn.RMSNorm(4), 5, 4, why="built-in RMS norm, default epsilon")
norm(
    "rms_norm_multi_axis", lambda: nn.RMSNorm((3, 4), eps=1e-3), 2, 3, 4, why="two normalised axes"
)
norm("group_norm", lambda: nn.GroupNorm(2, 4), 4, 3, 5, why="two groups over an image")
norm("group_norm_sequence", lambda: nn.GroupNorm(2, 4), 4, 5, why="two groups over a sequence")
norm("group_norm_vector", lambda: nn.GroupNorm(2, 6), 6, why="no positions besides channels")
norm(
    "instance_norm",
    lambda: nn.InstanceNorm2d(3, affine=True),
    3,
    4,
    5,
    why="with affine parameters",
)
norm("instance_norm_1d", lambda: nn.InstanceNorm1d(3, affine=True, eps=1e-2), 3, 5, why="sequences")
norm(
    "batch_norm_eval",
    lambda: nn.BatchNorm2d(3).eval(),
    3,
    4,
    4,
    why="in eval mode batch norm is an affine map with trainable parameters",
)
norm("batch_norm_eval_1d", lambda: nn.BatchNorm1d(4).eval(), 4, why="the same on vectors")
norm("prelu", lambda: nn.PReLU(), 3, 5, why="one slope for everything")
norm("prelu_channels", lambda: nn.PReLU(3), 3, 5, why="a slope per channel")
add(
    "batch_norm_eval_frozen",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.ReLU()),
    floats(2, 5, 5),
    "frozen affine parameters, running statistics as constants",
    trainable=freeze("1"),
)
add(
    "batch_norm_without_statistics",
    lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh()
    ),
    floats(2, 5, 5),
    "without running statistics a batch of one is well defined: it normalises over the image",
    may_refuse=r"BatchNorm|batch.norm",
)


@architecture("instance_norm_running_eval", floats(3, 4, 4))
class InstanceNormEval(nn.Module):
    """Instance norm that tracks statistics, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).tanh()


@architecture("rms_norm_by_hand", floats(5, 4))
class HandWrittenRMSNorm(nn.Module):
    """RMS norm as most language models write it: a product with a parameter, through float."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.head(self.weight * wide.to(x.dtype))


@architecture("layer_norm_shared_weight_and_bias", floats(5, 4))
class SharedWeightAndBias(nn.Module):
    """One parameter serves as the norm's weight and as its bias, in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = normal(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (4,), self.scale, self.scale).tanh()
        return F.layer_norm(x, (4,), bias=self.scale).tanh() + F.rms_norm(x, (4,), self.scale)


@architecture("layer_norm_one_plus_weight", floats(5, 4))
class OnePlusWeight(nn.Module):
    """The scale is stored as its difference from one (Gemma)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.rms_norm(x, (4,), 1.0 + self.weight))


@architecture("layer_norm_input_is_parameter", floats(5, 4))
class NormOfParameter(nn.Module):
    """The layer norm's input is a parameter: learned queries that no sample has touched."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.norm, self.mix = normal(3, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.mix(self.norm(self.queries))
        return (queries @ x.mT).softmax(-1) @ self.norm(x)


@architecture("adaptive_norm", floats(5, 4))
class AdaptiveNorm(nn.Module):
    """Scale and shift of a layer norm come from the sample (diffusion transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulate = nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.modulate(x.mean(1, keepdim=True)).chunk(2, dim=-1)
        return (self.norm(x) * (1 + scale) + shift).tanh()


@architecture("learned_activation", floats(5, 4))
class LearnedActivation(nn.Module):
    """Swish with a learned slope, maxout, and a per-channel rational function."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.coefficients, self.wide = normal(1), normal(3, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.slope * x)
        x = self.wide(x).unflatten(-1, (4, 2)).amax(-1)
        a, b, c = self.coefficients
        return (a + b * x) / (1 + (c * x).square())
