"""Models whose clipped gradient is undefined or cannot be computed: clipgrad has to say why."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ._base import add, architecture, floats, ids, normal

DATA_DEPENDENT = r"control flow|data.dependent"
OUTSIDE = r"closure|outside"
IMAGE = floats(3, 4, 4)


def _after_conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.Tanh())


add(
    "refused_batch_norm_train",
    lambda: _after_conv(nn.BatchNorm2d(3)),
    IMAGE,
    "samples are mixed and statistics leak",
    refused=r"BatchNorm",
)
add(
    "refused_batch_norm_vectors",
    lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    floats(4),
    "the same on vectors, where a batch of one is an error in torch",
    refused=r"BatchNorm",
)
add(
    "refused_instance_norm_statistics",
    lambda: _after_conv(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
    IMAGE,
    "running statistics are written",
    refused=r"buffer|InstanceNorm",
)
add(
    "refused_spectral_norm_train",
    lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    floats(4),
    "the power iteration writes buffers",
    refused=r"buffer",
)
add(
    "refused_spectral_norm_hook",
    lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    floats(4),
    "the older, hook-based spectral norm writes buffers",
    refused=r"buffer",
)
add(
    "refused_embedding_max_norm",
    lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 2)),
    ids(6, 5),
    "the forward rescales the table in place",
    refused=r"max_norm",
)


@architecture("refused_buffer_written", floats(4), refused=r"buffer")
class BufferWritten(nn.Module):
    """A running mean of the data is written in forward."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * out.mean(0))
        return out - self.mean


@architecture("refused_buffer_replaced", floats(4), refused=r"buffer")
class BufferReplaced(nn.Module):
    """A buffer is assigned anew in forward, not written in place."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.layer(x) / self.count


@architecture("refused_parameter_written", floats(4), refused=r"parameter|in[- ]?place")
class ParameterWritten(nn.Module):
    """The forward clamps its own weight before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.layer(x)


@architecture("refused_parameter_in_list", floats(4), refused=OUTSIDE)
class ParameterInList(nn.Module):
    """A registered parameter reaches the forward through a plain python list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = normal(3, 4), nn.Linear(3, 2)
        self.stash = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.stash[0]).tanh())


@architecture("refused_parameter_in_closure", floats(4), refused=OUTSIDE)
class ParameterInClosure(nn.Module):
    """A registered parameter is captured by a function object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.project = functools.partial(F.linear, weight=self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.layer(x).tanh()


@architecture("refused_view_made_early", floats(4), refused=OUTSIDE)
class ViewMadeEarly(nn.Module):
    """A view of a registered parameter was taken in __init__ and is used in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = normal(6, 4), nn.Linear(3, 2)
        self.views = (self.weight[:3],)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.views[0]).tanh())


@architecture("refused_branch_on_data", floats(4), refused=DATA_DEPENDENT)
class BranchOnData(nn.Module):
    """A python branch on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum() > 0 else self.right(x)


@architecture("refused_branch_on_parameter", floats(4), refused=DATA_DEPENDENT)
class BranchOnParameter(nn.Module):
    """A python branch on a parameter, which is the same for all samples but mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(4, 3), normal()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gate if self.gate > 0 else self.layer(x)


@architecture("refused_item", floats(4), refused=r"item|control flow|data.dependent")
class Item(nn.Module):
    """A number is taken out of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(x.abs().max().item())


@architecture("refused_boolean_index", floats(5, 4), refused=r"shape|control flow|data.dependent")
class BooleanIndex(nn.Module):
    """A boolean mask selects rows: the shape of the result depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept = x[x.sum(-1) > -10.0]
        return self.layer(kept).view(len(x), -1)


def _vector_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean(-1)


def _detached_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean().detach()


add(
    "refused_vector_loss",
    lambda: nn.Linear(4, 3),
    floats(4),
    "one loss per sample instead of a scalar",
    loss=_vector_loss,
    refused=r"scalar",
)
add(
    "refused_detached_loss",
    lambda: nn.Linear(4, 3),
    floats(4),
    "no parameter can be reached from the loss",
    loss=_detached_loss,
    refused=r"grad|depend",
)
