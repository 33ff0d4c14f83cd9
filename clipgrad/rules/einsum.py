"""This module has the rule for ``einsum`` of per-sample data with one weight; the equation determines the factors."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from clipgrad.rules.canonical import Outer, PerSample
from clipgrad.rules.names import functional_aten_names_of
from clipgrad.rules.operands import lowered, widen
from clipgrad.rules.registry import Call, Decline, Extent, Recipe, register_rule


@register_rule(torch.einsum, *functional_aten_names_of("einsum"), name="einsum")
def einsum(call: Call, equation: str, *operands: Tensor | Sequence[Tensor]) -> Tensor:
    """Run ``einsum`` of two operands, exactly one of which is shared by all samples."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2:
        raise Decline
    first, second = operands
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        raise Decline
    data_first = call.has_batch_axis(first)
    if data_first == call.has_batch_axis(second):
        raise Decline
    data, weight = (first, second) if data_first else (second, first)
    w = call.shared(weight)
    x = call.batched(data)
    letters = _parse(equation, data_first, x.dim() - 1)
    axes = Axes.of(letters, w.shape, x.shape)
    autocasts = torch.is_autocast_enabled(x.device.type)
    if autocasts and not axes.contracted:
        raise Decline  # without a sum, ``einsum`` is a product of elements, which autocast lowers on some devices
    x = lowered(x)
    if axes.is_outer:
        return _as_products(call, x, weight, w, axes)
    sample_axis = axes.sample_axis
    return call.finish(
        torch.einsum(f"{sample_axis}{axes.data},{axes.weight}->{sample_axis}{axes.output}", x, w),
        Recipe(
            weight,
            lambda g: PerSample(
                torch.einsum(
                    f"{sample_axis}{axes.data},{sample_axis}{axes.output}->{sample_axis}{axes.weight}",
                    widen(x),
                    widen(g),
                )
            ),
        ),
        saved=(x,),
    )


@dataclass(frozen=True)
class Axes:
    """This class holds the letters of an equation, with the role of each axis of the weight."""

    data: str  # Letters of the data, without its sample axis
    weight: str  # Letters of the weight
    output: str  # Letters of the output, without its sample axis
    sample_axis: str  # Letter of the sample axis
    groups: str  # Axes that weight, data and output have: independent products
    contracted: str  # Axes that weight and data have, and the output does not
    kept: str  # Axes that weight and output have, and the data does not
    positions: str  # Axes that data and output have, and the weight does not
    sizes: dict[str, int]  # Length of every axis

    @classmethod
    def of(
        cls, letters: tuple[str, str, str], weight_shape: Sequence[int], data_shape: Sequence[int]
    ) -> Axes:
        """Sort the axes by role.

        Decline if the weight's gradient is not just a sum of products of data and output gradient: the equation takes
        a diagonal of the weight, or sums or broadcasts one of its axes.
        """
        data, weight, output = letters
        if len(set(weight)) != len(weight) or set(weight) - set(data) - set(output):
            raise Decline
        if len(weight) != len(weight_shape) or len(data) != len(data_shape) - 1:
            raise Decline  # PyTorch refuses this call with its own message
        sizes = dict(zip(data, data_shape[1:], strict=True))
        for letter, size in zip(weight, weight_shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise Decline  # an axis of length 1 is broadcast
        if set(output) - set(sizes) or len(set(output)) != len(output):
            raise Decline
        sample_axis = next(c for c in string.ascii_letters if c not in data + weight + output)
        return cls(
            data,
            weight,
            output,
            sample_axis,
            groups="".join(c for c in weight if c in data and c in output),
            contracted="".join(c for c in weight if c not in output),
            kept="".join(c for c in weight if c not in data),
            positions="".join(c for c in data if c in output and c not in weight),
            sizes=sizes,
        )

    @property
    def rows_first(self) -> bool:
        """Return whether the kept axes of the weight come before the contracted axes."""
        return self.weight == self.groups + self.kept + self.contracted

    @property
    def is_outer(self) -> bool:
        """Return whether the weight is laid out as groups, rows, columns."""
        if self.groups and not (self.contracted and self.kept):
            return False
        return self.rows_first or self.weight == self.groups + self.contracted + self.kept

    def length(self, letters: str) -> int:
        """Return the number of elements over the given axes."""
        return prod(self.sizes[letter] for letter in letters)


def _as_products(call: Call, x: Tensor, weight: Tensor, w: Tensor, axes: Axes) -> Tensor:
    """Run one matrix product per group, of ``[groups, samples and positions, contracted]`` with the weight."""
    groups, contracted, kept = map(axes.length, (axes.groups, axes.contracted, axes.kept))
    samples, positions = call.batch_size, axes.length(axes.positions)
    order = axes.groups + axes.sample_axis + axes.positions
    left = torch.einsum(f"{axes.sample_axis}{axes.data}->{order}{axes.contracted}", x)
    left = left.reshape(groups, samples * positions, contracted)
    if axes.rows_first:
        product = torch.bmm(left, w.reshape(groups, kept, contracted).mT)
    else:
        product = torch.bmm(left, w.reshape(groups, contracted, kept))

    def by_sample(factor: Tensor) -> Tensor:
        by_group = factor.reshape(groups, samples, positions, factor.shape[-1])
        return by_group.transpose(0, 1).flatten(0, 1)

    def make(gradient: Tensor) -> Outer:
        inputs, outputs = by_sample(left), by_sample(gradient)
        rows, columns = (outputs, inputs) if axes.rows_first else (inputs, outputs)
        return Outer(rows, columns, w.shape, groups)

    def view(product: Tensor) -> Tensor:
        sizes = {**axes.sizes, axes.sample_axis: samples}
        shaped = product.view([sizes[letter] for letter in order + axes.kept])
        return shaped.permute(
            [(order + axes.kept).index(c) for c in axes.sample_axis + axes.output]
        )

    rows, columns = (kept, contracted) if axes.rows_first else (contracted, kept)
    extent = Extent(positions, rows, columns, groups)
    return call.finish(product, Recipe(weight, make, extent), saved=(left,), view=view)


def _parse(equation: str, data_first: bool, data_axes: int) -> tuple[str, str, str]:
    """Return the letters of data, weight and output; letters replace an ellipsis of the data."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise Decline
    data, weight = terms if data_first else reversed(terms)
    if "..." in weight:
        raise Decline
    if not arrow:
        both = (data + weight).replace("...", "")
        output = "..." if "..." in data else ""
        output += "".join(c for c in sorted(set(both)) if both.count(c) == 1)
    free = [c for c in string.ascii_letters if c not in equation]
    spelled = "".join(free[: max(0, data_axes - len(data.replace("...", "")))])
    data, output = data.replace("...", spelled, 1), output.replace("...", spelled, 1)
    if not all(c in string.ascii_letters for c in data + weight + output):
        raise Decline
    return data, weight, output
