"""Replace operations of a traced graph that the compiler handles slowly or wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from clipgrad.compiled.cross_entropy import nll_loss_backward
from clipgrad.compiled.shape import is_channels_last
from clipgrad.kernels.delayed import delay_until

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def _memory_format(gradient: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(gradient) else torch.contiguous_format


def _empty_image(gradient: Tensor, height: int, width: int) -> Tensor:
    """Return uninitialised memory for the image that was pooled, with the gradient's memory format."""
    shape = (*gradient.shape[:-2], height, width)
    return torch.empty(
        shape, dtype=gradient.dtype, device=gradient.device, memory_format=_memory_format(gradient)
    )


# With "flexible_layout" the compiler passes tensors in their own layout, and takes the result's layout from the fake.
@torch.library.custom_op(
    "clipgrad::max_pool2d_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def max_pool2d_backward(
    gradient: Tensor,
    indices: Tensor,
    height: int,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Run PyTorch's own backward kernel of max pooling over an image of this height and width.

    The compiler decomposes it into a search for indices and a scatter, which take 2.6 of a small CNN's 17 ms on the
    CPU; the kernel takes 0.5 ms.
    """
    layout = _memory_format(gradient)
    image = _empty_image(gradient, height, width)  # only its shape and layout are read
    result: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        gradient.contiguous(memory_format=layout), image, kernel_size, stride, padding, dilation, ceil_mode,
        indices.contiguous(memory_format=layout),
    )  # fmt: skip
    return result.contiguous(memory_format=layout)


@max_pool2d_backward.register_fake
def _(gradient: Tensor, indices: Tensor, height: int, width: int, *_: object) -> Tensor:
    return _empty_image(gradient, height, width)


def _pool_backward(
    gradient: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Any:
    if input.device.type != "cpu":
        return NotImplemented
    height, width = input.shape[-2:]
    lists = map(list, (kernel_size, stride, padding, dilation))
    return max_pool2d_backward(gradient, indices, height, width, *lists, ceil_mode)


@torch.library.custom_op(
    "clipgrad::attention_in_float64", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def attention_in_float64(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Run PyTorch's own kernel of attention on the CPU, and describe its second result correctly.

    The backward pass reads this result: logarithms of sums of exponentials, in float64 like the query. PyTorch 2.11
    tells the compiler that they are float32, so the compiled step would read their memory as float32.
    """
    output, logarithms = _CPU_ATTENTION(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output, logarithms


@attention_in_float64.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, mask, scale = arguments
    output, logarithms = _CPU_ATTENTION(query, *given, attn_mask=mask, scale=scale)
    return output, torch.empty_like(logarithms, dtype=query.dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    if query.dtype != torch.float64:
        return NotImplemented
    return attention_in_float64(query, key, value, dropout_p, is_causal, attn_mask, scale)


def _product_with_bias(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    """Compute a linear layer as a product and a sum, so that the compiler can fuse the sum with its consumers.

    PyTorch first copies the bias to every row of the result, which took 3.6 of a small transformer's 137 ms. The view
    between product and sum prevents the compiler from combining them into one operation again.
    """
    if bias.device.type != "cpu" or bias.dim() != 1 or (beta, alpha) != (1, 1):
        return NotImplemented
    product = a.mm(b)
    return (product.unsqueeze(0) + bias).squeeze(0)


def _input_gradient(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """Compute a convolution's input gradient as a convolution, which does not take the image as an operand.

    The gradient does not depend on the image, but PyTorch copies an image whose layout differs from the weight's: 24 of
    220 ms of a diffusion model's step.
    """
    if input.device.type != "cpu" or list(output_mask) != [True, False, False]:
        return NotImplemented
    axes = len(stride)
    left = [0] * axes
    if not transposed:  # pixels beyond the last position of the filter
        left = [
            size - ((count - 1) * step - 2 * pad + tap_stride * (taps - 1) + 1)
            for size, count, taps, step, pad, tap_stride in zip(
                input.shape[2:], gradient.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]  # fmt: skip
    found = torch.ops.aten.convolution(
        gradient, weight, None, stride, padding, dilation, not transposed, left, groups
    )
    if transposed:  # an output padding larger than a stride gives positions without a pixel
        for axis, size in enumerate(input.shape[2:], start=2):
            found = found.narrow(axis, 0, size)
    return found, None, None


def _delay_activation_gradient(operation: Any) -> Callable[..., Any]:
    """Delay the compiler's decomposition of an activation's backward pass until the gradient is computed.

    Otherwise the compiler on the CPU keeps a sigmoid or an exponential that is read twice from the forward pass on.
    """
    (decomposed,) = get_decompositions([operation]).values()

    def backward(gradient: Tensor, input: Tensor, *arguments: Any, **options: Any) -> Any:
        if input.device.type != "cpu":
            return NotImplemented
        return decomposed(gradient, delay_until(gradient, input), *arguments, **options)

    return backward


def _padded(input: Tensor, pad: Sequence[int], value: float = 0) -> Any:
    """Pad by concatenation where sizes are symbols; PyTorch's own operation makes numbers of them."""
    if not any(isinstance(size, torch.SymInt) for size in input.shape):
        return NotImplemented
    for number in range(len(pad) // 2):
        axis = input.dim() - 1 - number
        before, after = pad[2 * number : 2 * number + 2]
        start = max(0, -before)
        input = input.narrow(axis, start, input.shape[axis] - start - max(0, -after))
        pieces = [
            input.new_full((*input.shape[:axis], amount, *input.shape[axis + 1 :]), value)
            for amount in (max(0, before), max(0, after))
        ]
        input = torch.cat([pieces[0], input, pieces[1]], axis)
    return input


_ACTIVATIONS = (
    torch.ops.aten.gelu_backward.default,
    torch.ops.aten.mish_backward.default,
    torch.ops.aten.silu_backward.default,
    torch.ops.aten.softplus_backward.default,
)

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **{operation: _delay_activation_gradient(operation) for operation in _ACTIVATIONS},
    _CPU_ATTENTION: _attention,
    torch.ops.aten.addmm.default: _product_with_bias,
    torch.ops.aten.constant_pad_nd.default: _padded,
    torch.ops.aten.convolution_backward.default: _input_gradient,
    torch.ops.aten.max_pool2d_with_indices_backward.default: _pool_backward,
    torch.ops.aten.nll_loss_backward.default: nll_loss_backward,
}
