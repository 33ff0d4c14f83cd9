"""Autocast: each sample's gradient is that of the operation which ran, on the operands which it multiplied.

Autocast rounds an operation's operands to half precision. The inputs here have more digits than half precision holds,
and output gradients are powers of two, at one position for each channel. So a per-sample gradient is a rounded input
times a power of two. Half precision holds it exactly, and ordinary autograd under autocast finds it to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.engine.reference import per_sample_gradients_by_loop
from clipgrad.result import ClippedGradResult

B = 3
HALVES = (torch.bfloat16, torch.float16)
STRATEGIES = ("auto", "kept", "ghost")
Params = dict[str, Tensor]
Use = Callable[[Params, Tensor], Tensor]


def lora(p: Params, x: Tensor) -> Tensor:
    """A frozen layer and a low-rank product beside it."""
    return F.linear(x, torch.ones(4, 6)) + F.linear(F.linear(x, p["w"]), p["up"]) * 0.5


def attention(p: Params, x: Tensor) -> Tensor:
    """One position attends to itself alone, so that the values pass as they are."""
    return F.multi_head_attention_forward(
        x[0, :1, None], x[0, :1, None], x[0, :1, None], 6, 1, p["w"], None, None, None, False, 0.0, p["out"], None,
    )[0].flatten(0, 1)[None]  # fmt: skip


def recurrent(p: Params, x: Tensor) -> Tensor:
    """ReLU lets a sum of positive numbers pass; one step, since more steps add up gradients."""
    start = torch.ones(1, 1, 4)
    return torch.rnn_relu(x[:, :1], start, [p["w"], p["again"]], False, 1, 0.0, False, False, True)[
        0
    ]


# A use of the weight "w"; x is a batch of one, [1, positions, 6].
USES: dict[str, tuple[Use, dict[str, tuple[int, ...]]]] = {
    "linear": (lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (4, 6), "b": (4,)}),
    "linear, no positions": (lambda p, x: F.linear(x[:, 0], p["w"]), {"w": (4, 6)}),
    "matmul": (lambda p, x: x @ p["w"], {"w": (6, 4)}),
    "matmul of a view": (lambda p, x: x @ p["w"].t(), {"w": (4, 6)}),
    "matmul of a vector": (lambda p, x: (x @ p["w"])[..., None], {"w": (6,)}),
    "matmul, weight first": (lambda p, x: (p["w"] @ x.mT).mT, {"w": (4, 6)}),
    "mm": (lambda p, x: torch.mm(x[0], p["w"]), {"w": (6, 4)}),
    "aten.mm": (lambda p, x: torch.ops.aten.mm(x[0], p["w"]), {"w": (6, 4)}),
    "mv": (lambda p, x: torch.mv(x[0], p["w"])[:, None], {"w": (6,)}),
    "mv, weight first": (lambda p, x: torch.mv(p["w"], x[0, 0])[None], {"w": (4, 6)}),
    "addmm": (lambda p, x: torch.addmm(p["b"], x[0], p["w"]), {"w": (6, 4), "b": (4,)}),
    "einsum": (lambda p, x: torch.einsum("bsi,oi->bso", x, p["w"]), {"w": (4, 6)}),
    "einsum, columns first": (lambda p, x: torch.einsum("bsi,io->bso", x, p["w"]), {"w": (6, 4)}),
    "einsum, groups": (
        lambda p, x: torch.einsum("bsgi,gio->bsgo", x.unflatten(2, (2, 3)), p["w"]).flatten(2),
        {"w": (2, 3, 4)},
    ),
    "einsum, no factors": (lambda p, x: torch.einsum("bsi,i->bsi", x, p["w"]), {"w": (6,)}),
    "conv1d": (lambda p, x: F.conv1d(x.mT, p["w"], p["b"]).mT, {"w": (4, 6, 2), "b": (4,)}),
    "conv1d, groups": (lambda p, x: F.conv1d(x.mT, p["w"], groups=2).mT, {"w": (4, 3, 2)}),
    "conv2d": (lambda p, x: F.conv2d(x.view(1, 2, 3, 5), p["w"]).flatten(2).mT, {"w": (4, 2, 2, 2)}),
    "conv3d": (
        lambda p, x: F.conv3d(x.view(1, 2, 3, 5, 1), p["w"]).flatten(2).mT,
        {"w": (4, 2, 2, 2, 1)},
    ),
    "conv_transpose1d": (lambda p, x: F.conv_transpose1d(x.mT, p["w"]).mT, {"w": (6, 4, 1)}),
    "attention": (attention, {"w": (18, 6), "out": (6, 6)}),
    "recurrent": (recurrent, {"w": (4, 6), "again": (4, 4)}),
    "low rank": (lora, {"w": (2, 6), "up": (4, 2)}),
    "embedding": (lambda p, x: F.embedding(x[..., 0].long(), p["w"]), {"w": (5, 4)}),
    "no rule": (lambda p, x: torch.bmm(x, p["w"][None]), {"w": (6, 4)}),
}  # fmt: skip
IN_A_ROW = ("attention", "low rank")


def powers(*shape: int) -> Tensor:
    return 2.0 ** torch.randint(-2, 3, shape)


def make_params(shapes: dict[str, tuple[int, ...]]) -> Params:
    """Weights that both half-precision types hold exactly, so that rounding of weights plays no part."""
    return {name: powers(*shape) for name, shape in shapes.items()}


def inputs(*shape: int) -> Tensor:
    """Positive numbers of twelve binary digits; bfloat16 holds eight and float16 eleven."""
    return (2 * torch.randint(1024, 2048, shape) + 1) / 1024


def one_position(like: Tensor, name: str) -> Tensor:
    """A power of two for each channel, at one position; for two weights in a row, for one channel."""
    weights = torch.zeros(like.shape)
    flat = weights.view(-1, like.shape[-1])
    channels = torch.arange(flat.shape[1])[: 1 if name in IN_A_ROW else None]
    flat[torch.randint(len(flat), (len(channels),)), channels] = powers(len(channels))
    return weights


class Trial:
    """A use of a weight under autocast, and what ordinary autograd finds for each sample."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        *,
        inside: bool,
        use: Use | None = None,
        more: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        torch.manual_seed(0)
        plain, shapes = USES[name]
        use, shapes = use or plain, {**shapes, **(more or {})}
        self.params, x = make_params(shapes), inputs(B, 5, 6)
        with torch.no_grad():
            outputs = [use(self.params, x[i : i + 1]) for i in range(B)]
        self.batch = x, torch.cat([one_position(output, name)[None] for output in outputs])
        self.dtype, self.inside = dtype, inside

        def loss(p: Params, x: Tensor, counts: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=inside or torch.is_autocast_enabled("cpu")):
                y = use(p, x)
            return (y.float() * counts[0]).sum()

        self.loss = loss
        with self.outside():
            self.expected = per_sample_gradients_by_loop(loss, self.params, *self.batch)[1]

    def outside(self) -> Any:
        return torch.autocast("cpu", self.dtype, enabled=not self.inside)

    def run(self, sample: int, strategy: str, **options: Any) -> ClippedGradResult:
        """The gradient of one sample, among others that are padding."""
        gradient = clipped_grad(
            self.loss,
            max_grad_norm=torch.inf,
            performance=Performance(strategy=strategy),
            **options,
        )
        with self.outside():
            return gradient(self.params, *self.batch, is_padding=torch.arange(B) != sample)

    def compare(
        self, sample: int, found: ClippedGradResult, but: dict[str, float] | None = None
    ) -> None:
        """Compare to the last digit, ``but`` parameters with a tolerance of their own."""
        slack = but or {}
        wanted = {name: each[sample] for name, each in self.expected.items()}
        assert any(bool(each.any()) for each in wanted.values())
        for name, total in found.grads.items():
            assert total.dtype is torch.float32
            rtol = slack.get(name, 1e-6)
            torch.testing.assert_close(
                total,
                wanted[name],
                rtol=rtol,
                atol=100 * rtol if name in slack else 0,
                msg=lambda told, name=name: f"{name}: {told}",
            )
        norm = torch.cat([each.flatten() for each in wanted.values()]).double().norm()
        torch.testing.assert_close(found.grad_norms[sample].double(), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", USES)
def test_the_gradient_is_that_of_what_was_multiplied(
    name: str, dtype: torch.dtype, inside: bool
) -> None:
    trial = Trial(name, dtype, inside=inside)
    for strategy in STRATEGIES:
        for sample in range(B):
            trial.compare(sample, trial.run(sample, strategy))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", sorted(USES.keys() - {"embedding"}))
def test_after_a_norm_whose_output_stays_wide(name: str, dtype: torch.dtype) -> None:
    """A norm's output is float32, and the product rounds it; the norm's own parameters see rounded gradients."""
    use, _ = USES[name]

    def normed(p: Params, x: Tensor) -> Tensor:
        return use(p, F.layer_norm(x, (6,), p["gain"], p["shift"]) + 3)

    trial = Trial(name, dtype, inside=False, use=normed, more={"gain": (6,), "shift": (6,)})
    for strategy in ("kept", "ghost"):
        trial.compare(1, trial.run(1, strategy), but={"gain": 1e-4, "shift": 1e-4})


def test_a_write_after_the_product_changes_nothing() -> None:
    """The product holds a rounded copy, so the loss may write to its input, as ordinary autograd allows."""

    def loss(p: Params, x: Tensor) -> Tensor:
        h = x * p["gain"]
        y = F.linear(h, p["w"])
        h.add_(1000.0)
        return y.float().sum() + 0 * h.sum()

    torch.manual_seed(0)
    params, x = make_params({"gain": (6,), "w": (4, 6)}), inputs(B, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = clipped_grad(loss, max_grad_norm=torch.inf)(params, x)
        expected = per_sample_gradients_by_loop(loss, params, x)[1]
    torch.testing.assert_close(found.grads["w"], expected["w"].sum(0))


def test_float64_and_integers_are_left_alone() -> None:
    """Autocast lowers float32 and half precision only, and so must a rule."""
    params = {"w": torch.rand(4, 6, dtype=torch.float64)}
    x = torch.rand(B, 6, dtype=torch.float64)

    def loss(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        found = clipped_grad(loss, max_grad_norm=torch.inf)(params, x)
        expected = per_sample_gradients_by_loop(loss, params, x)[1]
    torch.testing.assert_close(found.grads["w"], expected["w"].sum(0), rtol=1e-12, atol=0)
