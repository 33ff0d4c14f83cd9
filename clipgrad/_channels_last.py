"""Convolutions laid out channels last on the CPU, unseen by the loss.

PyTorch pools an image channels last ten times as fast on the CPU as in its usual order, and convolves it as fast
(``docs/performance.md``). So from a first convolution on, where turning the image costs little, tensors flow in that
order through operations that do not care for it. Whatever might, a ``view`` for instance, receives a copy in the usual
order. The loss can see the difference only if it writes in place to a tensor that was copied, or to the copy. Versions
tell of it; then, or if anything is raised, the forward pass is run again without.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad._lanes import Decline, below_vmap, per_sample, physical

# Of its own results' layout none of these promises anything, and none looks at that of its operands.
_FUNCTIONS = """
    conv2d max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d lp_pool2d
    relu relu_ relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid softplus softsign sigmoid
    tanh dropout add sub mul div neg
"""
_QUESTIONS = "shape dtype device ndim is_cuda requires_grad"
_METHODS = """
    size dim numel nelement is_floating_point __len__
    add sub mul div neg add_ sub_ mul_ div_ relu relu_ sigmoid tanh
"""
_CONV2D = torch.conv2d
# Of other dtypes convolutions on the CPU are no faster, and without oneDNN none are.
DTYPES = frozenset({torch.float32})
# Elements of a first convolution's result for each of its image, which is copied.
WORTH = 2.0
# Elements of that result in all samples; below, Python takes longer than what is gained.
LARGE = 1 << 16


def _named(home: Any, names: str) -> set[Callable[..., Any]]:
    return {found for name in names.split() if (found := getattr(home, name, None)) is not None}


INDIFFERENT: frozenset[Callable[..., Any]] = frozenset(
    _named(torch.nn.functional, _FUNCTIONS)
    | _named(torch, _FUNCTIONS)
    | _named(Tensor, _METHODS)
    | {getattr(Tensor, name).__get__ for name in _QUESTIONS.split()}
)
# What is written by way of these leaves no trace in a version.
_UNTRACED = frozenset({Tensor.data.__get__, Tensor.data_ptr, Tensor.numpy, Tensor.untyped_storage})  # type: ignore[attr-defined]
# Takes a layout for granted without an error where it is another one.
_BY_STRIDES = frozenset({torch.as_strided, Tensor.as_strided})


class LayoutSeen(Exception):
    """The loss may have seen that a tensor is not laid out as it expects."""


class Switch:
    """Whether a transform still tries: not after a loss that minded.

    Attributes:
        on: As said.
    """

    __slots__ = ("on",)

    def __init__(self, on: bool) -> None:
        self.on = on


class ChannelsLast:
    """What is laid out channels last in one forward pass.

    Attributes:
        level: The ``vmap`` of the forward pass.
        used: Whether anything was laid out so.
    """

    def __init__(self) -> None:
        self.level = 0
        self.used = False
        self._ours: dict[int, weakref.ref[Tensor]] = {}
        self._copied: list[tuple[Tensor, int]] = []

    def before(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], bool]:
        """The positional arguments as an operation should get them, and whether its results are ours then.

        Raises:
            LayoutSeen: If the operation gives a way to its operand's memory.
        """
        if not self._ours or not any(map(self._holds_ours, (*args, *kwargs.values()))):
            if function is _CONV2D and (turned := self._turned(args, kwargs)) is not None:
                return [turned, *args[1:]], True
            return args, False
        if function in INDIFFERENT:
            return args, True
        if function in _UNTRACED or any(map(self._holds_ours, kwargs.values())):
            raise LayoutSeen
        return [self._usual(value) for value in args], False

    def elsewhere(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        """An operation inside a transform of the loss's own, whose operands may be made of ours.

        Raises:
            LayoutSeen: If it can tell.
        """
        if self.used and (function in _BY_STRIDES or any(map(self._holds_ours, args))):
            raise LayoutSeen

    def after(self, results: Sequence[Tensor]) -> None:
        """Remember results of an operation whose operands are ours."""
        for result in results:
            self._ours[id(result)] = weakref.ref(result)

    def check(self) -> None:
        """After the loss.

        Raises:
            LayoutSeen: If it wrote to a tensor that was copied, or to a copy.
        """
        if any(tensor._version != version for tensor, version in self._copied):
            raise LayoutSeen

    def _is_ours(self, value: Any) -> bool:
        reference = self._ours.get(id(value))
        return reference is not None and reference() is value

    def _holds_ours(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(map(self._holds_ours, value))
        return self._is_ours(value)

    def _usual(self, value: Any) -> Any:
        """An argument with copies of our tensors in the usual order, which the loss may look at."""
        if isinstance(value, list | tuple):
            return [self._usual(item) for item in value] if self._holds_ours(value) else value
        if not self._is_ours(value):
            return value
        with below_vmap():
            found = physical(value, self.level)
            if found is None or found.is_contiguous():
                return value
            copy = found.contiguous()
            self._copied += [(found, found._version), (copy, copy._version)]
        return per_sample(copy, self.level)

    def _turned(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        """The first argument of a convolution channels last, if that is cheap beside the convolution."""
        if len(args) < 2 or not all(isinstance(value, Tensor) for value in args[:2]):
            return None
        image, weight = args[0], args[1]
        stride = args[3] if len(args) > 3 else kwargs.get("stride", 1)
        if image.dtype not in DTYPES or weight.dtype is not image.dtype:
            return None
        try:
            found = physical(image, self.level)
        except Decline:
            return None
        if found is None or found.dim() < 4 or weight.dim() != 4 or found.device.type != "cpu":
            return None
        height, width = (stride, stride) if isinstance(stride, int) else (*stride, *stride)[:2]
        shrinks = height * width
        if WORTH * found.shape[-3] * shrinks > weight.shape[0] or not found.is_contiguous():
            return None
        if found.numel() // found.shape[-3] * weight.shape[0] // shrinks < LARGE:
            return None
        with below_vmap():
            flat = found.reshape(-1, *found.shape[-3:])
            turned = flat.contiguous(memory_format=torch.channels_last)
            self.used = True
            return per_sample(turned.view(found.shape), self.level)


def tried_here(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether such parameters gain by it: in a compiled graph the compiler lays tensors out."""
    return (
        dtype in DTYPES
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and get_proxy_mode() is None
        and not torch.is_autocast_enabled("cpu")
    )
