"""Losses of linear layers, convolutions and a tied embedding whose positions all but cancel, or do not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
SAMPLES, POSITIONS, WIDTH = 3, 64, 64
# bfloat16 rounds all numbers between these two to the same one.
LOW, HIGH = (1 + 2**-7 + sign * 0.98 * 2**-8 for sign in (-1, 1))


@dataclass(frozen=True)
class Model:
    """A loss with one weight, and a batch whose positions cancel in pairs, up to a distance if it is random."""

    loss: Callable[..., Tensor]
    weight: tuple[int, ...]
    batch: Callable[[float, torch.Generator], tuple[Tensor, ...]]


def linear(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return (F.linear(x, p["w"]) * y).sum()


def convolution(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """The taps of no two positions overlap."""
    return (F.conv2d(x, p["w"], stride=p["w"].shape[-1]) * y).sum()


def grouped(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return (F.conv1d(x, p["w"], stride=2, groups=2) * y).sum()


def tied(p: Params, ids: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """An embedding tied to an output layer, whose gradients are opposite."""
    chosen = F.one_hot(ids, len(p["w"])).to(v.dtype)
    return (F.embedding(ids, p["w"]) * u).sum() - (F.linear(v, p["w"]) * chosen).sum()


def _both(shape: tuple[int, ...], distance: float, generator: torch.Generator) -> list[Tensor]:
    first = torch.randn(SAMPLES, *shape, generator=generator)
    return [first, first + distance * torch.randn(first.shape, generator=generator)]


def for_linear(distance: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    half = (POSITIONS // 2, WIDTH)
    y = torch.randn(SAMPLES, *half, generator=generator)
    return torch.cat(_both(half, distance, generator), 1), torch.cat((y, -y), 1)


def for_convolution(distance: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    y = torch.randn(SAMPLES, WIDTH, 4, 8, generator=generator)
    return torch.cat(_both((4, 16, 32), distance, generator), 2), torch.cat((y, -y), 2)


def for_tied(distance: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    ids = torch.randint(WIDTH, (SAMPLES, POSITIONS), generator=generator)
    return ids, *_both((POSITIONS, WIDTH), distance, generator)


def planted(*_: object) -> tuple[Tensor, ...]:
    """Positions that bfloat16 takes for opposite ones; their difference is the largest such."""
    half = torch.ones(SAMPLES, POSITIONS // 2, 1)
    return torch.cat((HIGH * half, LOW * half), 1), torch.cat((HIGH * half, -LOW * half), 1)


def planted_image(*_: object) -> tuple[Tensor, ...]:
    x, y = (each.view(SAMPLES, 1, 8, POSITIONS // 8) for each in planted())
    return x, y


def planted_tied(*_: object) -> tuple[Tensor, ...]:
    """So many ids that their norm is one of rows; in bfloat16 the cross term would be larger than both norms."""
    u = torch.full((SAMPLES, 300, WIDTH), LOW)
    return torch.zeros(SAMPLES, 300, dtype=torch.long), u, torch.full_like(u, 0.921875)


def _independent(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SAMPLES, *shape, generator=generator) for shape in shapes)


MODELS = {
    "linear": Model(linear, (WIDTH, WIDTH), for_linear),
    "convolution": Model(convolution, (WIDTH, 4, 4, 4), for_convolution),
    "tied": Model(tied, (WIDTH, WIDTH), for_tied),
    "planted linear": Model(linear, (1, 1), planted),
    "planted convolution": Model(convolution, (1, 1, 1, 1), planted_image),
    "planted tied": Model(tied, (WIDTH, WIDTH), planted_tied),
}
RANDOM, PLANTED = ["linear", "convolution", "tied"], [name for name in MODELS if "planted" in name]
# 512 positions with independent gradients.
MANY = {
    "linear": Model(linear, (WIDTH, 32), lambda *_: _independent((512, 32), (512, WIDTH))),
    "convolution": Model(
        convolution, (16, 4, 2, 2), lambda *_: _independent((4, 32, 64), (16, 16, 32))
    ),
    "grouped": Model(grouped, (16, 4, 2), lambda *_: _independent((8, 1024), (16, 512))),
}
