"""Matrix products in all their spellings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]

WEIGHT = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)


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
    )  # fmt: skip


def twice(p: Params, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["w"], p["b"])


def frozen_below(p: Params, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, WEIGHT), p["w"], p["b"])


def written_to_in_place(p: Params, x: Tensor) -> Tensor:
    y = F.linear(x, p["w"], p["b"])
    y[..., 0] = 0
    y[..., 1:].mul_(2)
    return F.relu(y, inplace=True)


def beside_another_use(p: Params, x: Tensor) -> Tensor:
    """A rule, an operation without one and an expression of the same weight."""
    return F.linear(x, p["w"]) + F.linear(x, p["w"].square()) + (p["w"] * x.sum()).cumsum(0)[:1]


def packed(p: Params, x: Tensor) -> Tensor:
    q, k, v = p["w"].chunk(3)
    return F.linear(x, q) * F.linear(x, k) + F.linear(x, v)


def overlapping(p: Params, x: Tensor) -> Tensor:
    return F.linear(x, p["w"][:2]) * F.linear(x, p["w"][1:])


def unrolled(p: Params, x: Tensor) -> Tensor:
    """A recurrence by hand: one use per step, each of one position."""
    h = x[:, 0]
    for step in range(1, x.shape[1]):
        h = (F.linear(h, p["w"]) + x[:, step]).tanh()
    return h


W43, WB = {"w": (4, 3)}, {"w": (4, 3), "b": (4,)}
W33, WB3 = {"w": (3, 3)}, {"w": (3, 3), "b": (3,)}
W34, W34B = {"w": (3, 4)}, {"w": (3, 4), "b": (4,)}

LINEAR = [
    case("linear", "2-d", lambda p, x: F.linear(x, p["w"], p["b"]), WB, 3),
    case("linear", "3-d", lambda p, x: F.linear(x, p["w"], p["b"]), WB, 5, 3),
    case("linear", "4-d", lambda p, x: F.linear(x, p["w"], p["b"]), WB, 2, 4, 3),
    case("linear", "1-d", lambda p, x: F.linear(x[0], p["w"], p["b"]), WB, 3),
    case("linear", "no positions but one", lambda p, x: F.linear(x[:, :1], p["w"]), W43, 5, 3),
    case("linear", "no bias", lambda p, x: F.linear(x, p["w"]), W43, 5, 3),
    case("linear", "keywords", lambda p, x: F.linear(input=x, weight=p["w"], bias=p["b"]), WB, 2, 3),
    case("linear", "bias by keyword", lambda p, x: F.linear(x, p["w"], bias=p["b"]), WB, 3),
    case("linear", "frozen weight", lambda p, x: F.linear(x, WEIGHT, p["b"]), {"b": (4,)}, 2, 3),
    case("linear", "frozen bias", lambda p, x: F.linear(x, p["w"], WEIGHT[:, 0]), W43, 2, 3),
    case("linear", "above a frozen layer", frozen_below, {"w": (2, 4), "b": (2,)}, 2, 3),
    case("linear", "weight twice", twice, WB3, 5, 3),
    case("linear", "one output", lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (1, 3), "b": (1,)}, 3),
    case("linear", "transposed input", lambda p, x: F.linear(x.mT, p["w"]), W43, 3, 5),
    case("linear", "expanded input", lambda p, x: F.linear(x.expand(6, 3), p["w"]), W43, 3),
    case("linear", "output in place", written_to_in_place, WB, 2, 3),
    case("linear", "other uses", beside_another_use, W33, 5, 3),
    case("linear", "packed weight", packed, {"w": (6, 3)}, 5, 3),
    case("linear", "overlapping slices", overlapping, W33, 5, 3),
    case("linear", "unrolled", unrolled, W33, 5, 3),
    case("linear", "bias is the weight's row", lambda p, x: F.linear(x, p["w"], p["w"][:, 0]), W43, 5, 3),
    case("linear", "low rank", lambda p, x: F.linear(x, p["a"] @ p["b"]), {"a": (4, 1), "b": (1, 3)}, 5, 3),
    case("linear", "long", lambda p, x: F.linear(x, p["w"]), {"w": (2, 1)}, 300, 1),
]  # fmt: skip

MATMUL = [
    case("matmul", "x @ W, 2-d", lambda p, x: x @ p["w"], W34, 3),
    case("matmul", "x @ W, 3-d", lambda p, x: x @ p["w"], W34, 5, 3),
    case("matmul", "x @ W, 4-d", lambda p, x: x @ p["w"], W34, 2, 5, 3),
    case("matmul", "vector @ W", lambda p, x: x[0] @ p["w"], W34, 3),
    case("matmul", "x @ W.t()", lambda p, x: x @ p["w"].t(), W43, 5, 3),
    case("matmul", "x.matmul(W.mT)", lambda p, x: x.matmul(p["w"].mT), W43, 5, 3),
    case("matmul", "keyword", lambda p, x: torch.matmul(x, other=p["w"]), W34, 5, 3),
    case("matmul", "W @ vector", lambda p, x: p["w"] @ x[0], W43, 3),
    case("matmul", "W @ x", lambda p, x: p["w"] @ x[0], W43, 3, 5),
    case("matmul", "W @ x, 4-d", lambda p, x: p["w"] @ x, W43, 2, 3, 5),
    case("matmul", "x @ vector", lambda p, x: x @ p["w"], {"w": (3,)}, 5, 3),
    case("matmul", "vector @ vector", lambda p, x: x[0] @ p["w"], {"w": (3,)}, 3),
    case("matmul", "both sides", lambda p, x: p["w"] @ (x[0] @ p["w"]), W33, 3, 3),
    case("matmul", "with linear", lambda p, x: F.linear(x, p["w"]).tanh() @ p["w"], W43, 5, 3),
    case("matmul", "output in place", lambda p, x: (p["w"] @ x).mul_(2).add_(1), W43, 3, 5),
    case("rmatmul", "x @ W", lambda p, x: p["w"].__rmatmul__(x), W33, 5, 3),
    case("rmatmul", "W @ x", lambda p, x: x.__rmatmul__(p["w"]), W33, 3, 3),
    case("mm", "x, W", lambda p, x: torch.mm(x, p["w"]), W34, 3),
    case("mm", "W, x", lambda p, x: torch.mm(p["w"], x[0]), W43, 3, 5),
    case("mm", "keyword", lambda p, x: torch.mm(x[0], mat2=p["w"]), W34, 5, 3),
    case("mm", "method", lambda p, x: x[0].mm(p["w"]), W34, 5, 3),
    case("mv", "W, x", lambda p, x: torch.mv(p["w"], x[0]), W43, 3),
    case("mv", "X, w", lambda p, x: torch.mv(x[0], p["w"]), {"w": (3,)}, 5, 3),
    case("mv", "keyword, method", lambda p, x: p["w"].mv(vec=x[0]), W43, 3),
]  # fmt: skip

ADDMM = [
    case("addmm", "plain", lambda p, x: torch.addmm(p["b"], x, p["w"]), W34B, 3),
    case("addmm", "positions", lambda p, x: torch.addmm(p["b"], x[0], p["w"]), W34B, 5, 3),
    case("addmm", "alpha and beta", lambda p, x: torch.addmm(p["b"], x, p["w"], beta=-2, alpha=0.5), W34B, 3),
    case("addmm", "beta 0", lambda p, x: torch.addmm(WEIGHT[:, 0], x[0], p["w"], beta=0, alpha=3), W34, 5, 3),
    case("addmm", "method", lambda p, x: p["b"].addmm(x[0], p["w"], alpha=2), W34B, 5, 3),
    case("addmm", "keywords", lambda p, x: torch.addmm(input=p["b"], mat1=x, mat2=p["w"]), W34B, 3),
    case("addmm", "frozen weight", lambda p, x: torch.addmm(p["b"], x[0], WEIGHT, beta=2), {"b": (3,)}, 5, 4),
]  # fmt: skip

CASES = [*LINEAR, *MATMUL, *ADDMM]
