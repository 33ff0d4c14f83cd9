"""Every kind of convolution layer, one per architecture, and modules built around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, floats, normal


def layer(name: str, make: Callable[[], nn.Module], *shape: int, why: str) -> None:
    """Register one convolution layer, followed by a nonlinearity, on inputs of this shape."""
    add(name, lambda: nn.Sequential(make(), nn.Tanh()), floats(*shape), why)


class EvenSame(nn.Conv1d):
    """torch warns that padding='same' may copy for an even kernel; here that is the point."""

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().forward(x)


layer("conv1d", lambda: nn.Conv1d(3, 4, 3), 3, 7, why="plain")
layer(
    "conv1d_strided",
    lambda: nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=1),
    3,
    9,
    why="stride, dilation and padding, with input left over at the end",
)
layer(
    "conv1d_same_even_kernel",
    lambda: EvenSame(3, 4, 4, padding="same"),
    3,
    7,
    why="padding='same' with an even kernel pads unequally",
)
layer("conv1d_grouped", lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), 4, 7, why="two groups")
layer(
    "conv1d_depthwise_long",
    lambda: nn.Conv1d(4, 4, 12, groups=4, padding=11),
    4,
    12,
    why="a kernel as long as the sequence, one per channel (state-space models)",
)
layer("conv1d_time_of_one", lambda: nn.Conv1d(3, 4, 3, padding=1), 3, 1, why="one position only")
layer("conv2d", lambda: nn.Conv2d(2, 3, 3), 2, 6, 6, why="plain")
layer(
    "conv2d_no_bias_rectangular",
    lambda: nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 2), bias=False),
    2,
    5,
    6,
    why="nothing is square",
)
layer(
    "conv2d_same_dilated",
    lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=2),
    2,
    6,
    5,
    why="padding='same' with dilation",
)
layer("conv2d_valid", lambda: nn.Conv2d(2, 3, 3, padding="valid"), 2, 5, 5, why="padding='valid'")
for _mode in ("circular", "reflect", "replicate"):
    layer(
        f"conv2d_{_mode}",
        lambda mode=_mode: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode),
        2,
        5,
        6,
        why=f"padding mode {_mode}: the input is padded before the operation",
    )
layer(
    "conv1d_circular_same",
    lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"),
    2,
    6,
    why="padding='same' together with a padding mode",
)
layer("conv2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), 4, 6, 6, why="two groups")
layer(
    "conv2d_depthwise",
    lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1),
    3,
    5,
    5,
    why="depthwise with a multiplier of two",
)
layer(
    "conv2d_pointwise", lambda: nn.Conv2d(4, 3, 1), 4, 3, 5, why="1x1: a linear layer over pixels"
)
layer(
    "conv2d_pointwise_strided",
    lambda: nn.Conv2d(4, 3, 1, stride=2),
    4,
    5,
    5,
    why="1x1 with a stride skips pixels",
)
layer("conv2d_patchify", lambda: nn.Conv2d(3, 4, 2, stride=2), 3, 6, 4, why="stride equals kernel")
layer(
    "conv2d_patchify_remainder",
    lambda: nn.Conv2d(3, 4, 2, stride=2),
    3,
    7,
    5,
    why="stride equals kernel, but the last row and column are left over",
)
layer("conv2d_kernel_is_input", lambda: nn.Conv2d(2, 3, 4), 2, 4, 4, why="one output position")
layer(
    "conv3d",
    lambda: nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0)),
    2,
    3,
    4,
    4,
    why="plain",
)
layer(
    "conv3d_grouped_dilated",
    lambda: nn.Conv3d(4, 4, 2, groups=2, dilation=2),
    4,
    4,
    4,
    4,
    why="groups and dilation",
)
layer(
    "conv_transpose1d",
    lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1),
    3,
    5,
    why="stride with output padding",
)
layer("conv_transpose2d", lambda: nn.ConvTranspose2d(2, 3, 3), 2, 4, 4, why="plain")
layer(
    "conv_transpose2d_grouped",
    lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=2, padding=1, output_padding=(1, 0), groups=2, dilation=2
    ),
    4,
    3,
    4,
    why="groups, dilation and unequal output padding",
)
layer(
    "conv_transpose2d_depthwise",
    lambda: nn.ConvTranspose2d(3, 3, 2, stride=2, groups=3, bias=False),
    3,
    3,
    3,
    why="depthwise upsampling without bias",
)
layer(
    "conv_transpose3d",
    lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 2)),
    2,
    2,
    2,
    3,
    why="plain",
)


@architecture("conv_twice", floats(3, 5, 5))
class ConvTwice(nn.Module):
    """One convolution twice, the second time on a smaller image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.avg_pool2d(self.conv(x).tanh(), 2))


@architecture("conv_kernel_shared_with_transpose", floats(2, 6))
class ConvAndItsTranspose(nn.Module):
    """A tied autoencoder: encoder and decoder share the kernel, with different bias."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.encode, self.decode = normal(3, 2, 3), normal(3), normal(2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.conv1d(x, self.kernel, self.encode, padding=1).tanh()
        return F.conv_transpose1d(hidden, self.kernel, self.decode, padding=1)


@architecture("conv_unbatched_rows", floats(3, 7))
class UnbatchedConvolution(nn.Module):
    """A python loop over samples: the convolution sees inputs without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(sample) for sample in x.unbind(0)]).tanh()


@architecture("conv_of_merged_frames", floats(3, 2, 5, 5))
class MergedFrames(nn.Module):
    """Video frames are merged into the batch axis before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x.flatten(0, 1)).relu().flatten(1)
        return self.head(frames.view(len(x), 3, 3, 9)).amax(1)


@architecture("conv_per_sample_kernel", floats(2, 5, 5))
class PerSampleKernel(nn.Module):
    """Conditional convolution: kernels mixed per sample, the batch folded into the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.router = normal(3, 4, 2, 3, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = len(x)
        mixture = self.router(x.mean((2, 3))).softmax(-1)
        kernels = torch.einsum("bk,koixy->boixy", mixture, self.experts).flatten(0, 1)
        out = F.conv2d(x.reshape(1, size * 2, 5, 5), kernels, groups=size)
        return out.view(size, 4, 3, 3).tanh()


@architecture("conv_fft", floats(3, 8))
class FourierConvolution(nn.Module):
    """A long convolution by FFT with a parameter as kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.skip = normal(3, 8), normal(3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, n=16) * torch.fft.rfft(self.kernel, n=16)
        return torch.fft.irfft(spectrum, n=16)[..., :8].tanh() + x * self.skip[:, None]


@architecture("fourier_neural_operator", floats(2, 8))
class FourierOperator(nn.Module):
    """Complex weights viewed from a real parameter act on the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.local = normal(2, 2, 3, 2), nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :3]
        mixed = torch.einsum("bim,iom->bom", modes, torch.view_as_complex(self.weight))
        return (torch.fft.irfft(mixed, n=x.shape[-1]) + self.local(x)).tanh()


@architecture("causal_dilated_stack", floats(2, 9))
class WaveNet(nn.Module):
    """Gated, dilated, causally padded convolutions with skip connections (WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(2, 4, 2, dilation=2**i) for i in range(3)])
        self.skips = nn.ModuleList([nn.Conv1d(2, 3, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for step, (layer, skip) in enumerate(zip(self.layers, self.skips, strict=True)):
            value, gate = layer(F.pad(x, (2**step, 0))).chunk(2, dim=1)
            x = x + value.tanh() * gate.sigmoid()
            total = total + skip(x)
        return total
