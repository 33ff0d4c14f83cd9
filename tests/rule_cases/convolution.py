"""Convolutions of one to three axes: strides, paddings, dilations, groups, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def case(
    rule: str, name: str, forward: Forward, params: dict[str, tuple[int, ...]], *shape: int
) -> RuleCase:
    """A loss in which every output counts differently, on normal data of ``shape`` per sample."""

    def loss(p: Params, x: Tensor) -> Tensor:
        y = forward(p, x)
        return (y.sin() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum()

    return RuleCase(
        rule,
        name,
        loss,
        lambda: {name: torch.randn(*size, dtype=torch.float64) for name, size in params.items()},
        lambda size: (torch.randn(size, *shape, dtype=torch.float64),),
    )


def conv(name: str, weight: tuple[int, ...], shape: tuple[int, ...], **options: Any) -> RuleCase:
    axes = len(weight) - 2
    function: Any = PLAIN[axes]
    return case(
        f"conv{axes}d",
        name,
        lambda p, x: function(x, p["w"], p["b"], **options),
        {"w": weight, "b": weight[:1]},
        *shape,
    )


def transposed(
    name: str, weight: tuple[int, ...], shape: tuple[int, ...], **options: Any
) -> RuleCase:
    axes = len(weight) - 2
    function: Any = TRANSPOSED[axes]
    outputs = weight[1] * options.get("groups", 1)
    return case(
        f"conv_transpose{axes}d",
        name,
        lambda p, x: function(x, p["w"], p["b"], **options),
        {"w": weight, "b": (outputs,)},
        *shape,
    )  # fmt: skip


def residual(p: Params, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + F.conv1d(x, p["w"], p["b"], padding=1).tanh()
    return x


def two_resolutions(p: Params, x: Tensor) -> Tensor:
    fine, coarse = F.conv2d(x, p["w"], padding=1), F.conv2d(x, p["w"], stride=2, dilation=2)
    return fine.mean() + coarse.sum(dim=(1, 2, 3)).sin()


def two_groupings(p: Params, x: Tensor) -> Tensor:
    """One weight: its rows in two groups on four channels, then in one on two."""
    return F.conv1d(x, p["w"], groups=2).sum(-1) * F.conv1d(x[:, 1:3], p["w"]).sum(-1)


def autoencoder(p: Params, x: Tensor) -> Tensor:
    hidden = F.conv1d(x, p["w"], stride=2).tanh()
    return F.conv_transpose1d(hidden, p["w"], stride=2, output_padding=1)


def channels_last(p: Params, x: Tensor) -> Tensor:
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # the layout, spelt so that vmap allows it
    return F.conv2d(F.conv2d(x, p["w"], padding=1).relu(), p["v"])


def written_to_in_place(p: Params, x: Tensor) -> Tensor:
    y = F.conv1d(x, p["w"], p["b"])
    y[:, 0] = 0
    y[..., 1:].mul_(2)
    return F.relu(y, inplace=True)


FROZEN = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 2, 3)
WB1, WB2 = {"w": (4, 2, 3), "b": (4,)}, {"w": (4, 2, 3, 2), "b": (4,)}

ONE_AXIS = [
    conv("plain", (4, 2, 3), (2, 7)),
    conv("stride, padding, dilation", (4, 2, 3), (2, 9), stride=2, padding=3, dilation=2),
    conv("tuples", (4, 2, 3), (2, 9), stride=(2,), padding=(1,), dilation=(2,)),
    conv("same, odd total", (4, 2, 4), (2, 7), padding="same", dilation=3),
    conv("same, even total", (4, 2, 3), (2, 7), padding="same"),
    conv("valid", (4, 2, 3), (2, 7), padding="valid"),
    conv("groups", (4, 2, 3), (4, 7), groups=2, padding=1),
    conv("depthwise", (4, 1, 3), (4, 7), groups=4),
    conv("depthwise, two each", (6, 1, 3), (3, 7), groups=3, stride=2),
    conv("depthwise, as long as the sequence", (3, 1, 8), (3, 15), groups=3),
    conv("depthwise, pixels left over", (4, 1, 2), (2, 10), groups=2, stride=3, dilation=2, padding=1),
    conv("one output position", (4, 2, 7), (2, 7)),
    conv("leaves a rest", (4, 2, 3), (2, 8), stride=3),
    conv("1x1", (4, 3, 1), (3, 7)),
    case("conv1d", "no bias", lambda p, x: F.conv1d(x, p["w"]), {"w": (4, 2, 3)}, 2, 7),
    case("conv1d", "frozen weight", lambda p, x: F.conv1d(x, FROZEN, p["b"]), {"b": (2,)}, 2, 7),
    case("conv1d", "keywords", lambda p, x: F.conv1d(input=x, weight=p["w"], bias=p["b"]), WB1, 2, 7),
    case("conv1d", "positional", lambda p, x: F.conv1d(x, p["w"], p["b"], 2, 1, 2, 2), WB1, 4, 9),
    case("conv1d", "unbatched", lambda p, x: F.conv1d(x[0], p["w"], p["b"]), WB1, 2, 7),
    case("conv1d", "batch of three", lambda p, x: F.conv1d(x[0], p["w"], p["b"]), WB1, 3, 2, 7),
    case("conv1d", "reused", residual, {"w": (3, 3, 3), "b": (3,)}, 3, 7),
    case("conv1d", "two groupings", two_groupings, {"w": (4, 2, 3)}, 4, 6),
    case("conv1d", "output in place", written_to_in_place, WB1, 2, 7),
    case("conv1d", "of a view", lambda p, x: F.conv1d(x, p["w"].unflatten(1, (2, 3))), {"w": (4, 6)}, 2, 7),
    case("conv1d", "transposed input", lambda p, x: F.conv1d(x.mT, p["w"], padding=1), {"w": (4, 2, 3)}, 7, 2),
]  # fmt: skip

MORE_AXES = [
    conv("plain", (4, 2, 3, 2), (2, 5, 6)),
    conv("everything", (4, 2, 2, 3), (4, 7, 9), stride=(1, 2), padding=(2, 1), dilation=(1, 2), groups=2),
    conv("same, odd totals", (4, 2, 2, 4), (2, 5, 6), padding="same", dilation=(1, 1)),
    conv("patchify", (4, 3, 2, 2), (3, 4, 6), stride=2),
    conv("1x1", (4, 3, 1, 1), (3, 4, 5)),
    conv("large patch", (2, 9, 3, 3), (9, 4, 4), padding=1),
    conv("depthwise, two axes", (6, 1, 3, 2), (3, 6, 7), groups=3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    conv("one pixel, strided", (3, 2, 1, 1), (2, 5, 6), stride=2),
    conv("large patch, groups", (4, 8, 3, 3), (16, 4, 4), padding=1, groups=2, stride=2),
    case("conv2d", "two resolutions", two_resolutions, {"w": (2, 2, 3, 3)}, 2, 7, 7),
    case("conv2d", "channels last", channels_last, {"w": (4, 3, 3, 3), "v": (2, 4, 2, 2)}, 3, 5, 5),
    case("conv2d", "unbatched", lambda p, x: F.conv2d(x[0], p["w"], p["b"]), WB2, 2, 5, 6),
    case("conv2d", "batch of three", lambda p, x: F.conv2d(x[0], p["w"], p["b"], stride=2), WB2, 3, 2, 5, 6),
    case("conv2d", "circular",
         lambda p, x: F.conv2d(F.pad(x, [1, 1, 1, 1], "circular"), p["w"]), {"w": (4, 2, 3, 3)}, 2, 5, 6),
    conv("plain", (3, 2, 2, 3, 2), (2, 3, 4, 3)),
    conv("everything", (4, 1, 2, 1, 2), (2, 3, 3, 4), stride=(1, 2, 1), padding=(1, 0, 1),
         dilation=(1, 1, 2), groups=2),
    conv("patchify", (2, 1, 2, 2, 2), (1, 4, 4, 2), stride=2),
]  # fmt: skip

TRANSPOSED_CASES = [
    transposed("plain", (2, 4, 3), (2, 5)),
    transposed("stride, output padding", (2, 4, 3), (2, 5), stride=3, padding=1, output_padding=2),
    transposed("dilation", (2, 4, 3), (2, 5), dilation=2, padding=2, stride=2, output_padding=1),
    transposed("groups", (4, 2, 3), (4, 5), groups=2, stride=2),
    transposed("depthwise", (4, 1, 3), (4, 5), groups=4),
    transposed("depthwise, spread", (4, 1, 3), (4, 5), groups=4, stride=3, dilation=2, padding=1, output_padding=2),
    transposed("kernel below stride", (2, 3, 2), (2, 4), stride=3),
    case("conv_transpose1d", "unbatched",
         lambda p, x: F.conv_transpose1d(x[0], p["w"], p["b"]), {"w": (2, 4, 3), "b": (4,)}, 2, 5),
    case("conv_transpose1d", "batch of three",
         lambda p, x: F.conv_transpose1d(x[0], p["w"], stride=2), {"w": (2, 4, 3)}, 3, 2, 5),
    case("conv_transpose1d", "positional",
         lambda p, x: F.conv_transpose1d(x, p["w"], p["b"], 2, 1, 1, 2, 3), {"w": (4, 2, 3), "b": (4,)}, 4, 5),
    case("conv_transpose1d", "tied autoencoder", autoencoder, {"w": (4, 2, 3)}, 2, 8),
    transposed("plain", (2, 3, 2, 3), (2, 3, 4)),
    transposed("everything", (4, 2, 2, 3), (4, 3, 4), stride=(2, 1), padding=(0, 1), output_padding=(1, 0), groups=2),
    transposed("large patch", (4, 8, 3, 3), (4, 3, 3), groups=2, stride=2, padding=1, output_padding=1, dilation=2),
    transposed("plain", (2, 3, 2, 1, 2), (2, 2, 3, 2)),
    transposed("stride", (2, 1, 2, 2, 2), (2, 2, 2, 2), stride=2, output_padding=1, padding=1),
]  # fmt: skip

CASES = [*ONE_AXIS, *MORE_AXES, *TRANSPOSED_CASES]
