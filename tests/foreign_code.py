"""Code of a user's that mixes samples wherever PyTorch calls it with the tensors of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import graph
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

Params = dict[str, Tensor]
Loss = Callable[[Params, Tensor], Tensor]


def quantised(t: Tensor) -> Tensor:
    """To 8 bits by the largest value: what one sample holds decides how all others are rounded."""
    scale = t.abs().max() / 127 + 1e-30
    return (t / scale).round() * scale


def _mixed(result: Any) -> Any:
    large = isinstance(result, Tensor) and result.is_floating_point() and result.dim() > 1
    return quantised(result) if large and result.numel() else result


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _mixed(func(*args, **(kwargs or {})))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return _mixed(result) if func in (F.linear, torch.tanh, Tensor.tanh) else result


class Functions(Tensor):
    """A subclass that changes results of functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (F.linear, Tensor.mul, Tensor.__getitem__):
            return _mixed(result.as_subclass(Tensor))
        return result


class Dispatched(Tensor):
    """A subclass that holds another tensor and changes results of operations on it."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Dispatched:
        made: Dispatched = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda leaf: leaf.inner if isinstance(leaf, Dispatched) else leaf, (args, kwargs or {})
        )
        return _mixed(func(*args, **kwargs))


class Heir(Dispatched):
    """Its method is inherited."""


class _Generated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return quantised(gradient)


class _OwnRule(_Generated):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, in_dims[0]


class _NoRule(_Generated):
    generate_vmap_rule = False


@torch.library.custom_op("clipgrad_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_autograd(lambda ctx, gradient: quantised(gradient))
doubled.register_fake(torch.empty_like)


@dataclass(frozen=True)
class Hostile:
    """A loss, what is active around the step, what wraps the batch, and what the refusal says.

    Attributes:
        loss: As ``clipped_grad`` takes it.
        message: Of the refusal; None if it runs, and then the sensitivity must hold.
        around: Entered around the step.
        wrap: Changes the parameters or the batch.
    """

    loss: Loss
    message: str | None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    wrap: Callable[[Params, Tensor], tuple[Params, Tensor]] = lambda p, x: (p, x)


def plain(p: Params, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["w"]).tanh(), p["v"]).square().sum()


def _under(context: Callable[[], AbstractContextManager[Any]]) -> Loss:
    def loss(p: Params, x: Tensor) -> Tensor:
        with context():
            return plain(p, x)

    return loss


def _between(function: Callable[[Tensor], Any]) -> Loss:
    """A loss that hands its hidden value to a function, and goes on with what comes back, if anything."""

    def loss(p: Params, x: Tensor) -> Tensor:
        hidden = F.linear(x, p["w"])
        returned = function(hidden)
        hidden = returned if isinstance(returned, Tensor) else hidden
        return F.linear(hidden.tanh(), p["v"]).square().sum()

    return loss


def _halved(*gradients: Any) -> Any:
    return None


def _module_hook(register: Callable[[nn.Module], Any]) -> Loss:
    class Tanh(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    def change(module: Any, *gradients: Any) -> Any:
        return tuple(map(quantised, gradients[0]))

    def through(hidden: Tensor) -> Tensor:
        layer = Tanh()
        handle = register(layer)(change)
        try:
            found: Tensor = layer(hidden)
            return found
        finally:
            handle.remove()

    return _between(through)


_CONSTANT = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)


def _with_constant(
    kind: Callable[[Tensor], Tensor], use: Callable[[Tensor, Tensor], Tensor]
) -> Loss:
    constant = kind(_CONSTANT)
    return lambda p, x: plain(p, use(F.linear(x, p["w"][:4]), constant))


def _hooks() -> AbstractContextManager[Any]:
    return graph.saved_tensors_hooks(quantised, lambda t: t)


def _checkpointed(*, reentrant: bool) -> Loss:
    return _between(lambda h: checkpoint(torch.tanh, h, use_reentrant=reentrant))


SAVED = r"saved tensors hooks.*save_on_cpu.*all samples at once.*microbatch_size"
MODE = r"{}, a Torch(Dispatch|Function)Mode, is active.*Leave the mode"
KIND = r"of class {}, a tensor subclass whose __torch_(function|dispatch)__.*ordinary tensor"
NODE = r"grad_fn\.{}.*all samples at once.*pre_clipping_transform"
HOOK = r"registers a hook.*"
SUBCLASSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Functions": lambda t: t.as_subclass(Functions),
    "Dispatched": Dispatched,
    "Heir": Heir,
}
HOSTILE: dict[str, Hostile] = {
    "saved tensors hooks inside": Hostile(_under(_hooks), SAVED),
    "saved tensors hooks around": Hostile(plain, SAVED, _hooks),
    "save_on_cpu inside": Hostile(_under(graph.save_on_cpu), SAVED),
    "save_on_cpu around": Hostile(plain, SAVED, graph.save_on_cpu),
    "mutation allowed inside": Hostile(_under(graph.allow_mutation_on_saved_tensors), SAVED),
    "mutation allowed around": Hostile(plain, SAVED, graph.allow_mutation_on_saved_tensors),
    # What Python is refused for and the graph of one sample's loss can do.
    "checkpoint": Hostile(_checkpointed(reentrant=False), None),
    "reentrant checkpoint": Hostile(_checkpointed(reentrant=True), None),
    "hooks in torch.func.grad": Hostile(
        lambda p, x: plain(p, torch.func.grad(lambda z: _under(_hooks)(p, z))(x)), SAVED
    ),
    "dispatch mode inside": Hostile(_under(DispatchMode), MODE.format("DispatchMode")),
    "dispatch mode around": Hostile(plain, MODE.format("DispatchMode"), DispatchMode),
    "function mode inside": Hostile(_under(FunctionMode), None),  # it sees single samples
    "function mode around": Hostile(plain, MODE.format("FunctionMode"), FunctionMode),
    "node hook": Hostile(
        _between(lambda h: (h.grad_fn.register_hook(_halved), None)[1]),
        NODE.format("register_hook"),
    ),
    "node prehook": Hostile(
        _between(lambda h: (h.grad_fn.register_prehook(_halved), None)[1]),
        NODE.format("register_prehook"),
    ),
    "next node": Hostile(
        _between(lambda h: (h.grad_fn.next_functions[0][0].register_hook(_halved), None)[1]),
        NODE.format("next_functions"),
    ),
    "multi-grad hook, all": Hostile(
        _between(lambda h: (graph.register_multi_grad_hook([h], _halved), None)[1]), HOOK
    ),
    "multi-grad hook, any": Hostile(
        _between(lambda h: (graph.register_multi_grad_hook([h], _halved, mode="any"), None)[1]),
        HOOK,
    ),
    "multi-grad hook of a parameter": Hostile(
        lambda p, x: (graph.register_multi_grad_hook([p["w"]], _halved), plain(p, x))[1], "hook"
    ),
    "tensor hook": Hostile(_between(lambda h: (h.register_hook(quantised), None)[1]), HOOK),
    "retain_grad": Hostile(_between(lambda h: h.retain_grad()), "retain_grad"),
    "post-accumulate hook": Hostile(
        lambda p, x: (p["w"].register_post_accumulate_grad_hook(_halved), plain(p, x))[1], HOOK
    ),
    "module full backward hook": Hostile(
        _module_hook(lambda m: m.register_full_backward_hook), r"backward hook"
    ),
    "module full backward pre-hook": Hostile(
        _module_hook(lambda m: m.register_full_backward_pre_hook), r"backward hook"
    ),
    "module old backward hook": Hostile(
        _module_hook(lambda m: m.register_backward_hook), r"backward hook"
    ),
    "global full backward hook": Hostile(
        _module_hook(lambda m: global_hooks.register_module_full_backward_hook), r"backward hook"
    ),
    "global full backward pre-hook": Hostile(
        _module_hook(lambda m: global_hooks.register_module_full_backward_pre_hook),
        r"backward hook",
    ),
    "Function with a derived rule": Hostile(_between(_Generated.apply), None),
    "Function with a rule of its own": Hostile(_between(_OwnRule.apply), None),
    "Function without a rule": Hostile(_between(_NoRule.apply), None),
    "custom operation": Hostile(_between(doubled), None),
    **{
        f"constant {name}, {use}": Hostile(_with_constant(kind, function), KIND.format(name))
        for name, kind in SUBCLASSES.items()
        for use, function in {
            "linear": F.linear,
            "mul": lambda h, c: h * c[:1],
            "matmul": torch.matmul,
            "func.vmap": lambda h, c: torch.func.vmap(lambda row: row * c[0])(h),
        }.items()
    },
    **{
        f"batch {name}": Hostile(
            plain, KIND.format(name), wrap=lambda p, x, kind=kind: (p, kind(x))
        )  # type: ignore[misc]
        for name, kind in SUBCLASSES.items()
    },
    **{
        f"parameter {name}": Hostile(
            plain,
            KIND.format(name),
            wrap=lambda p, x, kind=kind: ({**p, "w": kind(p["w"])}, x),  # type: ignore[misc]
        )
        for name, kind in SUBCLASSES.items()
    },
}
