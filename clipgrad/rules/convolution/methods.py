"""This module has five ways to compute per-sample weight gradients of a convolution, with equal results.

* **patches** unfolds the image and takes one product per sample;
* **rows** unfolds the output gradient instead, where it has few channels;
* **slices** unfolds the image along all axes but the first, and takes one product per sample and tap of the first axis;
* **groups** takes the library's own weight gradient of one convolution in which every sample is a group;
* **exchange** convolves the output gradient over the image, for filters of one channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil, prod

import torch
from torch import Tensor

from clipgrad._functorch import is_symbol
from clipgrad.kernels.delayed import delay_until, in_graph_for_cpu
from clipgrad.kernels.float32_precision import convolution_product, window_products
from clipgrad.rules.canonical import Outer
from clipgrad.rules.convolution.geometry import Geometry
from clipgrad.rules.convolution.unfolding import (
    number_of_parts,
    pieces,
    rows_and_image,
    rows_and_patches,
    unfold,
)
from clipgrad.rules.one_hot import OneHot

# CUDA computes a product in blocks of its result. Positions are split until there are this many blocks, if each part
# keeps at least this many positions.
_BLOCK, _ENOUGH_BLOCKS, _FEWEST_POSITIONS = 32, 512, 128

# In at most so many parts a graph for any number of samples unfolds them itself, by device. Then a compiler fuses the
# copies. One operation would copy slowly: a CPU copies patches at a seventh of the speed of compiled code.
_PATCHES_BY_COMPILERS, _SLICES_BY_COMPILERS = {"cpu": 4}, {"cuda": 1}

Method = Callable[[Tensor, Tensor, torch.Size, Geometry], Tensor]


def by_patches(gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Unfold the image and take one product per sample, for a limited number of samples at a time."""
    rows, image = rows_and_image(gradient, input, geometry)
    samples, copies = image.shape[0], prod(shape[2:]) * prod(rows.shape[2:])
    if _left_to_run_time(rows, image, copies, _PATCHES_BY_COMPILERS):
        return _as_operation("patches", gradient, input, shape, geometry)
    if number_of_parts(image, copies) == 1:
        outer = rows_and_patches(gradient, input, shape, geometry)
        unfolded = prod(shape[2:]) > 1  # otherwise factors are views, and parts would be copies
        return _product_in_parts(outer, _parts(outer, input.device) if unfolded else 1)
    outers = (
        rows_and_patches(gradient[piece], input[piece], shape, geometry)
        for piece in pieces(image, copies)
    )
    if input.device.type == "cpu" and not is_symbol(samples):  # torch 2.11 makes a number of it
        return _multiply_into_result(outers, samples)
    return _concatenate_products(outers)


def _multiply_into_result(outers: Iterable[Outer], samples: int) -> Tensor:
    """Write products directly into the result, which saves a pass over memory and a second copy of the products."""
    found, stop = torch.empty(0), 0
    for outer in outers:
        assert not isinstance(outer.left, OneHot)
        if stop == 0:
            found = outer.right.new_empty(samples, *outer.shape)
        start, stop = stop, stop + outer.samples
        place = found[start:stop].view(outer.left.shape[0], -1, outer.right.shape[2])
        torch.bmm(outer.left.transpose(1, 2), outer.right, out=place)
    return found


def _concatenate_products(outers: Iterable[Outer]) -> Tensor:
    return torch.cat([outer.per_sample(convolution_product) for outer in outers])


def _product_in_parts(outer: Outer, parts: int) -> Tensor:
    """Compute the product of each sample as a sum of products over parts of its positions."""
    if parts == 1:
        return outer.per_sample(convolution_product)
    assert not isinstance(outer.left, OneHot)
    left, right = (
        factor.reshape(factor.shape[0] * parts, -1, factor.shape[2])
        for factor in (outer.left, outer.right)
    )
    shape = torch.Size((parts, *left.shape[2:], right.shape[2]))
    cut = replace(outer, left=left, right=right, shape=shape, groups=parts)
    return cut.per_sample(convolution_product).sum(1).view(outer.samples, *outer.shape)


def _parts(outer: Outer, device: torch.device) -> int:
    """Return the number of parts of positions, so that products with few rows and columns use the whole GPU."""
    if device.type != "cuda":
        return 1
    assert not isinstance(outer.left, OneHot)
    products, positions, rows = outer.left.shape
    blocks = products * ceil(rows / _BLOCK) * ceil(outer.right.shape[2] / _BLOCK)
    parts = 1
    while (
        2 * parts * blocks <= _ENOUGH_BLOCKS
        and positions % (2 * parts) == 0
        and positions >= 2 * parts * _FEWEST_POSITIONS
    ):
        parts *= 2
    return parts


def by_rows(gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Unfold the output gradient at every pixel of the image, and take one product per sample.

    Tap ``k`` multiplied pixel ``q`` for output ``q + padding - dilation * k``. So the gradient is padded by
    ``(size - 1) * dilation - padding``, and its patches hold the taps in reverse order.
    """
    if is_symbol(input.shape[0]):
        return _as_operation("rows", gradient, input, shape, geometry)
    taps = shape[2:]
    padding = tuple(
        (size - 1) * dilation - pad
        for size, dilation, pad in zip(taps, geometry.dilation, geometry.padding, strict=True)
    )
    padded, pixels = replace(geometry, padding=padding), input.shape[2:]
    products = []
    for piece in pieces(gradient, prod(taps) * prod(pixels)):
        patches = unfold(gradient[piece], taps, pixels, padded).flatten(1, 1 + len(taps)).flatten(2)
        product_shape = torch.Size((patches.shape[1], shape[1]))
        image = input[piece].flatten(2).transpose(1, 2)
        outer = Outer(patches.transpose(1, 2), image, product_shape)
        products.append(_product_in_parts(outer, _parts(outer, input.device)))
    found = _concatenate(products)
    found = found.view(input.shape[0], shape[0], *taps, shape[1])
    return found.flip(list(range(2, 2 + len(taps)))).movedim(-1, 2)


def by_slices(gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Take one product per tap of the first axis, whose positions are consecutive in memory.

    In memory, the taps of the first axis come directly after the sample axis of the result.
    """
    rows, image = rows_and_image(gradient, input, geometry)
    first, *others = shape[2:]
    positions, *across = rows.shape[2:]
    # Patches are one tap high, and cover all heights that any tap of the first axis uses.
    height = positions + (first - 1) * geometry.dilation[0]
    window_stride = geometry.dilation[0] * prod(across)
    copies = prod(others) * height * prod(across)
    if _left_to_run_time(rows, image, copies, _SLICES_BY_COMPILERS):
        return _as_operation("slices", gradient, input, shape, geometry)
    products = []
    for piece in pieces(image, copies):
        slices = unfold(image[piece], (1, *others), (height, *across), geometry)
        columns = slices.flatten(1, 2 + len(others)).flatten(2)
        products.append(window_products(rows[piece].flatten(2), columns, window_stride, first))
    found = _concatenate(products)
    return found.view(rows.shape[0], first, shape[0], shape[1], *others).movedim(1, 3)


def _left_to_run_time(rows: Tensor, image: Tensor, copies: int, most: dict[str, int]) -> bool:
    """Return whether a graph for any number of samples does not unfold them itself, in ``most`` parts by device."""
    if not is_symbol(image.shape[0]):
        return False
    lengths = (*rows.shape[1:], *image.shape[1:])
    if any(map(is_symbol, lengths)):
        return True
    return number_of_parts(image, copies) > most.get(image.device.type, 0)


def _concatenate(products: list[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(products)


def by_groups(gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Run the weight gradient of one convolution whose groups are the samples.

    In a traced graph on CPU, or for any number of samples, this is a custom operation. Otherwise a compiler would make
    the folded images channels last, which suits ordinary convolutions; with hundreds of groups this is two to three
    times slower, copies included.
    """
    if in_graph_for_cpu(gradient) or is_symbol(input.shape[0]):
        return _as_operation("groups", gradient, delay_until(gradient, input), shape, geometry)
    samples = input.shape[0]

    def fold(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, samples * tensor.shape[1], *tensor.shape[2:])

    weight = input.new_empty(samples * shape[0], *shape[1:])  # only its shape is read
    found = geometry.weight_gradient(fold(gradient), fold(input), weight, samples * geometry.groups)
    return found.contiguous().view(samples, *shape)


def _as_operation(
    method: str, gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry
) -> Tensor:
    """Leave a method to run time, as one operation of the graph: how it cuts the samples depends on their number."""
    found: Tensor = _operation(
        method, gradient, input, shape, geometry.stride, geometry.padding, geometry.dilation,
        geometry.groups, geometry.transposed, geometry.output_padding,
    )  # fmt: skip
    return found


@torch.library.custom_op("clipgrad::per_sample_weight_gradient", mutates_args=())
def _operation(
    method: str,
    gradient: Tensor,
    input: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    geometry = Geometry(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding)
    )
    run = {"patches": by_patches, "rows": by_rows, "slices": by_slices, "groups": by_groups}[method]
    return run(gradient, input, torch.Size(shape), geometry).contiguous()


@_operation.register_fake
def _(method: str, gradient: Tensor, input: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    return input.new_empty(input.shape[0], *shape)


def by_exchange(gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Convolve the output gradient over the image for filters of one channel, with stride and dilation exchanged.

    Every channel of every sample is a group of one forward convolution.
    """
    rows, image = rows_and_image(gradient, input, geometry)
    samples = image.shape[0]
    exchanged = replace(
        geometry,
        stride=geometry.dilation,
        dilation=geometry.stride,
        groups=samples * geometry.groups,
        transposed=False,
    )
    found = exchanged.convolve(
        image.reshape(1, -1, *image.shape[2:]), rows.reshape(-1, 1, *rows.shape[2:]), None
    )
    for axis, size in enumerate(shape[2:], start=2):
        found = found.narrow(axis, 0, size)  # with a stride, no output may use the last pixels
    return found.reshape(samples, *shape)
