"""Random programs of rules, expressions of parameters, in-place writes and fallbacks against the definition."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import clipped_grad
from clipgrad._reference import Params, clipped_sum, per_sample_gradients_by_loop
from tests.small_mlp import STRATEGIES, close, draw

STEPS, WORDS = 4, 5
POSITIONS = torch.arange(STEPS)
Operation = Callable[[Params, Tensor, Tensor], Tensor]


def first_from_second(p: Params, h: Tensor, ids: Tensor) -> Tensor:
    h = h.clone()
    h[:, 1] = 2 * h[:, 0]
    return h


def without_grad(p: Params, h: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return h + F.linear(h, p["w"])


def recurrence(p: Params, h: Tensor, ids: Tensor) -> Tensor:
    state, states = h[:, 0], []
    for step in range(STEPS):
        state = (F.linear(state, p["w"]) + h[:, step]).tanh()
        states.append(state)
    return torch.stack(states, 1)


def self_attention(p: Params, h: Tensor, ids: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h @ p["u"], h @ p["v"], h)


# From [1, STEPS, 3] to the same shape; parameters are shared by all of them on purpose.
OPERATIONS: list[Operation] = [
    lambda p, h, ids: F.linear(h, p["w"], p["b"]),
    lambda p, h, ids: F.linear(h, p["u"]),
    lambda p, h, ids: h @ p["w"],
    lambda p, h, ids: h @ p["v"].t(),
    lambda p, h, ids: (p["u"] @ h.mT).mT,
    lambda p, h, ids: p["time"] @ h,
    lambda p, h, ids: torch.addmm(p["b"], h[0], p["u"], alpha=0.5, beta=2.0)[None],
    lambda p, h, ids: torch.einsum("bti,oi->bto", h, p["w"]),
    lambda p, h, ids: h + F.embedding(ids, p["table"]),
    lambda p, h, ids: h * F.embedding(ids, p["table"], padding_idx=1),
    lambda p, h, ids: h + F.embedding(POSITIONS, p["table"]),
    lambda p, h, ids: h + F.linear(h, p["table"])[..., :3],
    lambda p, h, ids: F.conv1d(h.mT, p["kernel"], p["b"], padding=1).mT,
    lambda p, h, ids: F.conv_transpose1d(h.mT, p["kernel"], padding=1).mT,
    lambda p, h, ids: F.conv1d(h.mT, p["kernel"][:, :1], groups=3, padding="same").mT,
    lambda p, h, ids: F.layer_norm(h, (3,), p["gain"], p["b"]),
    lambda p, h, ids: F.group_norm(h.mT, 1, p["gain"], p["b"]).mT,
    lambda p, h, ids: h * p["gain"] + p["b"],
    lambda p, h, ids: F.linear(h, p["w"] / p["w"].norm(dim=1, keepdim=True)),
    lambda p, h, ids: F.linear(h, p["u"] @ p["v"]),
    lambda p, h, ids: F.linear(h, p["w"] - p["w"].mT),
    lambda p, h, ids: h * F.linear(h, p["packed"].chunk(3)[1]) + F.linear(h, p["packed"][:3]),
    lambda p, h, ids: F.linear(h, p["packed"][2:5]),
    lambda p, h, ids: h * (p["u"].sum(0).exp() / 10) + p["v"][0],
    lambda p, h, ids: torch.cat([p["b"].expand(1, 1, 3), h[:, 1:]], 1),
    lambda p, h, ids: h + F.linear(F.linear(h, p["u"]).tanh(), p["u"]),
    lambda p, h, ids: h + F.linear(h.detach(), p["u"]),
    lambda p, h, ids: h + F.linear(h[:, -1], p["w"])[:, None],
    lambda p, h, ids: (h @ p["w"] @ h.mT).softmax(-1) @ h,
    lambda p, h, ids: h - h.mean(1, keepdim=True),
    lambda p, h, ids: (h + 0).mul_(1.1).add_(h),
    lambda p, h, ids: F.relu(h + 0.1, inplace=True),
    first_from_second,
    without_grad,
    recurrence,
    self_attention,
]


def program(seed: int) -> Operation:
    chooser = random.Random(seed)
    steps = chooser.choices(OPERATIONS, k=chooser.randint(2, 6))

    def loss(p: Params, h: Tensor, ids: Tensor) -> Tensor:
        for step in steps:
            h = step(p, h, ids).clamp(-5, 5)
        weights = torch.linspace(0.5, 1.5, h.numel(), dtype=h.dtype).view_as(h)
        return (F.linear(h, p["w"]).sin() * weights).sum()

    return loss


@pytest.mark.parametrize("seed", range(60))
def test_program(seed: int) -> None:
    torch.manual_seed(seed)
    square = {name: draw(3, 3) for name in ("u", "v", "w")}
    vectors = {name: draw(3) for name in ("b", "gain")}
    params = square | vectors | {"table": draw(WORDS, 3), "kernel": draw(3, 3, 3)}
    params |= {"packed": draw(9, 3), "time": draw(STEPS, STEPS)}
    batch = draw(3, STEPS, 3), torch.randint(WORDS, (3, STEPS))
    loss = program(seed)
    gradients = per_sample_gradients_by_loop(loss, params, *batch)[1]
    norm = 1.01 * float(clipped_sum(gradients, 1.0)[1].median())
    sums, norms = clipped_sum(gradients, norm)
    for strategy in STRATEGIES:
        for microbatch in (None, 2):
            result = clipped_grad(
                loss, max_grad_norm=norm, strategy=strategy, microbatch_size=microbatch
            )(params, *batch)
            close(result.grad_norms, norms, rtol=1e-9, atol=1e-9)
            close(result.grads, sums, rtol=1e-9, atol=1e-9)
