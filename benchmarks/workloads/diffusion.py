"""A denoising diffusion model of small images: a U-Net with group norm, time embedding and self-attention."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads._workload import Workload

STEPS = 1000
"""Noise levels."""


class TimeEmbedding(nn.Module):
    """Sines and cosines of the noise level, then two linear layers."""

    def __init__(self, waves: int, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) * torch.arange(waves // 2) / (waves // 2))
        self.register_buffer("frequencies", frequencies)
        self.up, self.down = nn.Linear(waves, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        result: Tensor = self.down(F.silu(self.up(torch.cat([angles.sin(), angles.cos()], dim=1))))
        return result


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the time is added in between."""

    def __init__(self, before: int, channels: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(groups, before), nn.GroupNorm(groups, channels)
        self.conv_1 = nn.Conv2d(before, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time, channels)
        self.skip = nn.Conv2d(before, channels, 1) if before != channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv_2(F.silu(self.norm_2(h)))
        result: Tensor = self.skip(x) + h
        return result


class SelfAttention(nn.Module):
    """One head over all pixels, written out as in the first diffusion models."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # [n, channels, pixels]
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
        result: Tensor = x + self.out((v @ weights.transpose(1, 2)).view_as(x))
        return result


class UNet(nn.Module):
    """Down, a middle with self-attention, and up again, every level joined to its counterpart.

    One residual block a level on the way down, one on the way up; resolution halves between levels.
    """

    def __init__(self, channels: tuple[int, ...], groups: int) -> None:
        super().__init__()
        first, last, time = channels[0], channels[-1], 4 * channels[0]
        self.time = TimeEmbedding(first, time)
        self.stem = nn.Conv2d(3, first, 3, padding=1)
        pairs = list(zip((first, *channels), channels, strict=False))
        self.down = nn.ModuleList(ResidualBlock(a, b, time, groups) for a, b in pairs)
        self.smaller = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.middle_1 = ResidualBlock(last, last, time, groups)
        self.attention = SelfAttention(last, groups)
        self.middle_2 = ResidualBlock(last, last, time, groups)
        self.up = nn.ModuleList(ResidualBlock(2 * b, a, time, groups) for a, b in reversed(pairs))
        self.larger = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in reversed(channels[:-1]))
        self.norm = nn.GroupNorm(groups, first)
        self.head = nn.Conv2d(first, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(t)
        x = self.stem(x)
        levels: list[Tensor] = []
        for index, block in enumerate(self.down):
            if index:
                x = self.smaller[index - 1](x)
            x = block(x, time)
            levels.append(x)
        x = self.middle_2(self.attention(self.middle_1(x, time)), time)
        for index, block in enumerate(self.up):
            if index:
                x = self.larger[index - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = block(torch.cat([x, levels.pop()], dim=1), time)
        noise: Tensor = self.head(F.silu(self.norm(x)))
        return noise


def noised(size: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the noise to add, and its level: drawn here, so that a sample's loss is a function of the sample."""
    shape = (batch_size, 3, size, size)
    return torch.randn(shape), torch.randn(shape), torch.randint(0, STEPS, (batch_size,))


def denoising(model: nn.Module, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, with the cosine schedule."""
    angle = ((t + 0.5) / STEPS * (math.pi / 2))[:, None, None, None].to(x.dtype)
    return F.mse_loss(model(angle.cos() * x + angle.sin() * noise, t), noise)


def _workload(
    name: str,
    size: int,
    channels: tuple[int, ...],
    groups: int,
    cpu: tuple[int, ...],
    cuda: tuple[int, ...],
) -> Workload:
    return Workload(
        name=name,
        description=f"U-Net on {size}x{size}x3 images, {len(channels)} levels {channels}, group norm, "
        "self-attention in the middle, predicted noise",
        model=partial(UNet, channels, groups),
        batch=partial(noised, size),
        loss=denoising,
        batch_sizes={"cpu": cpu, "cuda": cuda},
    )


DIFFUSION = (_workload("diffusion", 32, (32, 64, 96), 8, cpu=(16,), cuda=(32, 128)),)
