"""Checkpoints, nested transforms, custom functions, hooks, routing, state and randomness."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from ._base import add, architecture, floats, ids, normal, several


def _mlp(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, width))


class Checkpointed(nn.Module):
    """The middle block is recomputed in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.before, self.block, self.after = nn.Linear(4, 4), _mlp(), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, self.before(x), use_reentrant=self.reentrant)
        return self.after(hidden.tanh())


add(
    "checkpoint",
    lambda: Checkpointed(reentrant=False),
    floats(5, 4),
    "without reentrance",
    may_refuse=r"checkpoint",
)
add(
    "checkpoint_reentrant",
    lambda: Checkpointed(reentrant=True),
    floats(5, 4),
    "reentrant",
    may_refuse=r"checkpoint",
)


@architecture("soft_mixture_of_experts", floats(5, 4))
class SoftExperts(nn.Module):
    """All experts run; a router mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.ModuleList([_mlp() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * self.router(x).softmax(-1).unsqueeze(-2)).sum(-1)


@architecture("hard_mixture_of_experts", floats(5, 4))
class HardExperts(nn.Module):
    """Each position takes its best expert, by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.ModuleList([_mlp() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        best, choice = weights.max(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out = out + (choice == index).to(x.dtype) * best * expert(x)
        return out


@architecture("autocast", floats(5, 4), tolerance=1e-2)
class Autocast(nn.Module):
    """Half the model under autocast, which leaves float64 alone but casts float32 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = _mlp(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            hidden = self.inner(self.inner(x))
        return self.head(hidden.to(x.dtype))


@architecture("stacked_experts", several(floats(5, 4), ids(3, 5)))
class StackedExperts(nn.Module):
    """Expert weights are one stacked parameter, gathered for each position by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = normal(3, 4, 4), normal(3, 4)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        return (torch.einsum("bti,btio->bto", x, self.weight[choice]) + self.bias[choice]).tanh()


@architecture("ensemble_by_vmap", floats(4))
class Ensemble(nn.Module):
    """torch.vmap inside the model: an ensemble's stacked parameters are mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = normal(3, 2, 4), normal(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        members = torch.vmap(F.linear, in_dims=(None, 0, 0))(x, self.weight, self.bias)
        return members.tanh().transpose(0, 1)


@architecture("inplace_arithmetic", floats(5, 4))
class InPlace(nn.Module):
    """Outputs of layers with parameters are changed in place, whole and by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(4, 4), nn.Linear(4, 4), normal(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += x
        hidden.mul_(0.5).add_(self.shift)
        hidden[:, 0] *= 2.0
        hidden = self.second(hidden.relu())
        hidden[..., 1:] += self.shift[1:]
        return hidden.sigmoid_()


class _Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x**3 * scale

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return 3 * x**2 * scale * grad, (x**3 * grad).sum_to_size(scale.shape)


@architecture("custom_function", floats(5, 4))
class CustomFunction(nn.Module):
    """A user's autograd.Function with a generated vmap rule takes a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), normal(4)

    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(self.layer(x), self.scale)


class _OldScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum_to_size(scale.shape)


@architecture(
    "custom_function_old_style", floats(5, 4), may_refuse=r"setup_context|vmap|autograd.Function"
)
class OldCustomFunction(nn.Module):
    """A user's autograd.Function written before vmap: no setup_context, no vmap rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), normal(4)

    def forward(self, x: Tensor) -> Tensor:
        return _OldScale.apply(self.layer(x), self.scale)


@architecture("tensor_hook", floats(4), may_refuse=r"hook")
class TensorHook(nn.Module):
    """A hook on an inner tensor reverses the gradient; dropping it silently would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: -0.5 * grad)
        return self.second(hidden)


@architecture("gradient_reversal_by_detach", floats(4))
class DetachReversal(nn.Module):
    """Gradient reversal spelled with detach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.second(1.5 * hidden.detach() - 0.5 * hidden)


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2.0 + inputs[0])
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].square(),))
    return model


add("forward_hooks", _hooked, floats(4), "module hooks change inputs and outputs")


@architecture("python_state", floats(4))
class PythonState(nn.Module):
    """Plain python state changes in forward: a counter, and activations kept for inspection."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.seen = nn.Linear(4, 3), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.layer(x).tanh()
        self.seen = out
        return out


@architecture("shape_dependent_code", floats(5, 4))
class ShapeDependent(nn.Module):
    """Branches, views and constants depend on shapes, which is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        size, steps = x.size(0), x.size(1)
        layer = self.long if steps > 3 else self.short
        return layer(x.reshape(size, -1, 4)) / steps + x.new_ones(size, 1, 3)
