"""Small image models: residual, dense, U-shaped, attentive, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, classify, floats, ids, normal, several

LABELLED = several(floats(3, 8, 8), ids(4))


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


add("cnn", _cnn, LABELLED, "convolution, pooling, classifier", loss=classify)
add(
    "cnn_pooling_zoo",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(4, 4, 1),
        nn.LPPool2d(2, 2),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveMaxPool2d(2),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    ),
    LABELLED,
    "average, power, adaptive pooling",
    loss=classify,
)
add(
    "cnn_local_response",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(3), nn.Conv2d(4, 4, 3)),
    floats(3, 6, 6),
    "local response normalisation has no parameters but mixes channels",
)
add(
    "cnn_relu_inplace",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.LeakyReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 4),
        nn.ELU(inplace=True),
    ),
    floats(3, 6, 6),
    "in-place activations overwrite the outputs of convolutions and linear layers",
)


def _channels_last(size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, 8, 8).to(memory_format=torch.channels_last)
    return images, torch.randint(4, (size,))


def _channels_last_cnn() -> nn.Module:
    return _cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


add(
    "cnn_channels_last",
    _channels_last_cnn,
    _channels_last,
    "model and batch are in channels-last memory",
    loss=classify,
)


@architecture(
    "cnn_channels_last_inside", LABELLED, loss=classify, may_refuse=r"memory_format|channels"
)
class ChannelsLastInside(nn.Module):
    """The forward converts its input to channels-last memory; vmap does not know how."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _channels_last_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=torch.channels_last))


class ResidualBlock(nn.Module):
    """Two convolutions with group norm and a projected shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(2, outputs), nn.GroupNorm(1, outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norms[0](self.first(x)), inplace=True)
        out = self.norms[1](self.second(out))
        out += self.shortcut(x)
        return out.relu()


add(
    "resnet",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        ResidualBlock(4, 4, 1),
        ResidualBlock(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ),
    LABELLED,
    "residual blocks with group norm and in-place addition",
    loss=classify,
)


@architecture("densenet", floats(3, 5, 5))
class DenseNet(nn.Module):
    """Each layer reads the concatenation of everything before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).tanh()], dim=1)
        return x


@architecture("squeeze_excite", floats(4, 5, 5))
class SqueezeExcite(nn.Module):
    """Channels are gated by a bottleneck network on their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.reduce, self.expand = nn.Conv2d(4, 4, 3), nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = self.expand(self.reduce(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None]


@architecture("mobile_block", floats(4, 6, 6))
class MobileBlock(nn.Module):
    """Inverted residual: pointwise, depthwise, pointwise, hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.narrow = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.hardswish(self.depth(F.relu6(self.expand(x)))))


@architecture("convnext_block", floats(4, 6, 6))
class ConvNeXtBlock(nn.Module):
    """Depthwise convolution; layer norm and linears on permuted channels; a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.LayerNorm(4)
        self.grow, self.shrink, self.scale = nn.Linear(4, 8), nn.Linear(8, 4), normal(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depth(x).permute(0, 2, 3, 1))
        hidden = self.scale * self.shrink(F.gelu(self.grow(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


@architecture("unet_with_time", several(floats(2, 8, 8), floats()))
class TimeUNet(nn.Module):
    """A diffusion U-Net: time embedding, skip connection, transposed convolution, group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
        self.down, self.middle = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.up = nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 2, 4, 2, 1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phases = time[:, None] * torch.arange(1, 3, dtype=x.dtype, device=x.device)
        context = self.time(torch.cat([phases.sin(), phases.cos()], dim=1))
        hidden = self.norm(self.down(x)) + context[:, :, None, None]
        hidden = hidden + self.middle(F.silu(hidden))
        return self.out(torch.cat([self.up(hidden), x], dim=1))


@architecture("superresolution", floats(2, 4, 4))
class SuperResolution(nn.Module):
    """Pixel shuffle, then bilinear and nearest resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.refine = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 1, 3)
        self.upsample = nn.Upsample(scale_factor=1.5, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        fine = F.pixel_shuffle(self.conv(x), 2)
        fine = fine + F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
        return self.refine(self.upsample(fine).tanh())


@architecture("max_unpooling", floats(2, 4, 4))
class MaxUnpooling(nn.Module):
    """Pooling indices are kept and used to undo the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(self.encode(x), 2, return_indices=True)
        return self.decode(F.max_unpool2d(pooled.tanh(), places, 2))


@architecture("spatial_transformer", floats(2, 5, 5))
class SpatialTransformer(nn.Module):
    """The image is resampled on a grid that the model predicts around a learned one."""

    def __init__(self) -> None:
        super().__init__()
        self.locate, self.base = nn.Linear(50, 6), normal(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = 0.1 * self.locate(x.flatten(1)).view(-1, 2, 3) + self.base
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


@architecture("mlp_mixer", floats(6, 4))
class MixerBlock(nn.Module):
    """Linear layers alternate between the token and the feature axis."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.features = nn.Linear(6, 6), nn.Linear(4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.tokens(self.norms[0](x).mT)).mT
        return x + F.gelu(self.features(self.norms[1](x)))


@architecture("point_cloud", floats(7, 3))
class PointCloud(nn.Module):
    """A network shared by all points, as 1x1 convolutions, then their maximum (PointNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Sequential(nn.Conv1d(3, 5, 1), nn.Softplus(), nn.Conv1d(5, 6, 1))
        self.head = nn.Linear(6, 2)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.lift(points.mT).amax(-1))
