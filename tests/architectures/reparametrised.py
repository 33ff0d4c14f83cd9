"""Weights that are viewed, cast, normalised or otherwise computed before use."""

from __future__ import annotations

import warnings

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ._base import add, architecture, floats, normal


@architecture("weight_views", floats(4))
class WeightViews(nn.Module):
    """The weight arrives as a view, a permutation, a flip and a clone of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.cube = normal(16), normal(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.flat.view(4, 4)).tanh() + F.linear(x, self.flat.view(4, 4).flip(0))
        return F.linear(x, self.cube.permute(0, 2, 1).reshape(4, 4).clone().contiguous()).tanh()


@architecture("weight_cast_double", floats(4))
class CastDouble(nn.Module):
    """The weight is cast up; in double precision the cast returns the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.weight.double()).tanh().to(x.dtype)


@architecture("weight_cast_float", floats(4), tolerance=1e-5)
class CastFloat(nn.Module):
    """The weight is cast down to float32 for one product, as a mixed-precision layer would."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = normal(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x.float(), self.weight.float()).to(x.dtype).tanh())


class Symmetric(nn.Module):
    """A user's own parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def _old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but still met
        nn.utils.weight_norm(layer)


def _parametrized(register: object) -> nn.Module:
    layer = nn.Linear(4, 4)
    register(layer)  # type: ignore[operator]
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


add(
    "weight_norm",
    lambda: _parametrized(parametrizations.weight_norm),
    floats(5, 4),
    "the weight is computed from a direction and a length",
)
add(
    "weight_norm_convolution",
    lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 2)),
    floats(4, 5),
    "weight norm on a convolution",
)
add(
    "orthogonal_weight",
    lambda: _parametrized(parametrizations.orthogonal),
    floats(5, 4),
    "an orthogonal weight by the matrix exponential",
)
add(
    "spectral_norm_eval",
    lambda: _parametrized(parametrizations.spectral_norm).eval(),
    floats(5, 4),
    "in eval mode the power iteration's buffers are only read",
)
add(
    "weight_norm_hook",
    lambda: _parametrized(_old_weight_norm),
    floats(5, 4),
    "the older, hook-based weight norm sets a plain tensor attribute before each call",
)
add(
    "own_parametrization",
    lambda: _parametrized(
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric())
    ),
    floats(5, 4),
    "a parametrization written by the user",
)


@architecture("weight_standardised", floats(2, 6, 6))
class WeightStandardised(nn.Module):
    """A convolution whose kernel is standardised at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight
        mean, spread = kernel.mean((1, 2, 3), keepdim=True), kernel.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (kernel - mean) / (spread + 1e-3), self.conv.bias).tanh()
