"""Compute the gradient of a padded output on all of its columns, and then write zeros into the padding.

The rule for ``linear`` pads wide outputs such as logits, so that products read aligned rows. The loss then reads a
slice of them, and the gradient is padded again. TorchInductor would ask for each element whether it is padding before
it loads it. So it loads one element at a time: 1.26 instead of 0.62 ms for the logits of GPT-2 at 16 x 512 tokens on
an H200.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from clipgrad.compiled.views import VIEWS, view_base, written_bases

_DEVICES = {"cuda"}  # a CPU was not measured
# Columns of padding that align a row of 16-bit numbers. A slice of a few columns should not read all the others.
_MOST_PADDING = 7
_ATEN = torch.ops.aten
_COPIES = {
    _ATEN._to_copy.default, _ATEN.alias.default, _ATEN.clone.default, _ATEN.detach.default,
}  # fmt: skip


def pad_last(module: GraphModule) -> None:
    """Rewrite each padded gradient whose elements depend on their own column, and on values of their row."""
    graph = module.graph
    nodes = graph.find_nodes(op="call_function", target=_ATEN.slice_backward.default)
    paddings = [(node, columns) for node in nodes if (columns := _columns(node)) is not None]
    if not paddings:
        return
    written = written_bases(graph)
    for node, columns in paddings:
        value = node.meta["val"]
        widening = _Widening(graph, columns, value.shape[-1], written)
        try:
            wide = widening.wide(node.args[0])
        except _CannotWidenError:
            continue  # what was inserted so far is unused
        with graph.inserting_before(node):
            inside, zero = widening.inside(value, 0.0)
            padded = graph.call_function(_ATEN.where.self, (inside, wide, zero))
        padded.meta.update(node.meta)
        node.replace_all_uses_with(padded)
    graph.eliminate_dead_code()
    module.recompile()


def _columns(node: Node) -> int | None:
    """Return how many columns a gradient has before a few columns of zeros are added; None if that is not all."""
    given: Any = node.args
    _, sizes, axis, start, stop, step = given
    value, full = node.meta["val"], sizes[-1]
    # Sizes that differ from batch to batch are nodes, and columns may be counted from the end.
    known = isinstance(full, int) and isinstance(stop, int)
    first_columns = (axis, start, step) == (value.dim() - 1, 0, 1)
    if not (known and first_columns and value.device.type in _DEVICES):
        return None
    return stop if stop >= 2 and 0 < full - stop <= _MOST_PADDING else None


def _is_elementwise(node: Node) -> bool:
    """Return whether each element depends on its own place in the arguments, and on nothing else."""
    target = node.target
    if not isinstance(target, OpOverload) or any(isinstance(a, Node) for a in node.kwargs.values()):
        return False
    elementwise = torch.Tag.pointwise in target.tags and not target._schema.is_mutable
    draws = torch.Tag.nondeterministic_seeded in target.tags
    return target in _COPIES or (elementwise and not draws)


def _is_over_columns(axis: Any, value: Tensor) -> bool:
    """Return whether a softmax is one over columns, in a precision in which PyTorch computes it as it is."""
    return axis in (-1, value.dim() - 1) and value.dtype in (torch.float32, torch.float64)


class _CannotWidenError(Exception):
    """An element depends on other columns."""


class _Widening:
    """This class computes values with ``full`` columns whose first ``columns`` are those of the given values.

    Args:
        graph: Where each wide operation is inserted right after the narrow one.
        columns: Number of columns of the given values.
        full: Number of columns of the results.
        written: Nodes whose memory changes, so that a later operation could read other values.
    """

    def __init__(self, graph: Graph, columns: int, full: int, written: set[Node]) -> None:
        self._graph, self._columns, self._full = graph, columns, full
        self._written = written
        self._known: dict[Node, Node] = {}

    def wide(self, node: Any) -> Any:
        """Return the wide value of a node; what has one value for each row has it already.

        Raises:
            _CannotWidenError: If an element depends on other columns.
        """
        if not isinstance(node, Node):
            return node
        value = node.meta.get("val")
        # Without a value, this module made the node, for another padding.
        if value is None or view_base(node) in self._written:
            raise _CannotWidenError
        shape = value.shape
        if not shape or (isinstance(shape[-1], int) and shape[-1] == 1):
            return node
        if not self._is_narrow(value):
            raise _CannotWidenError
        if node not in self._known:
            with self._graph.inserting_before(node.next):
                self._known[node] = self._made(node)
        return self._known[node]

    def inside(self, like: Tensor, outside: float) -> tuple[Node, Node]:
        """Return a mask of the given columns, and the value of the others as a tensor."""
        columns = self._call(
            _ATEN.arange.default, self._full, dtype=torch.int32, device=like.device
        )
        value = self._call(
            _ATEN.scalar_tensor.default, outside, dtype=like.dtype, device=like.device
        )
        return self._call(_ATEN.lt.Scalar, columns, self._columns), value

    def _made(self, node: Node) -> Node:
        if _is_elementwise(node):
            return self._call(node.target, *map(self.wide, node.args), **node.kwargs)
        if node.target in VIEWS:
            source, sizes = node.args
            if not self._is_narrow(source.meta.get("val")):  # type: ignore[union-attr]
                raise _CannotWidenError  # columns of the view may be rows
            # The sizes of the call, since in a value they may be symbols.
            return self._call(_ATEN.view.default, self.wide(source), [*sizes[:-1], self._full])  # type: ignore[index,misc]
        if node.target is _ATEN.arange.default and node.args == (self._columns,):
            return self._call(_ATEN.arange.default, self._full, **node.kwargs)
        if node.target is _ATEN.slice.Tensor and (source := self._sliced(*node.args)) is not None:
            return source
        if node.target is _ATEN._log_softmax.default:
            return self._log_softmax(node)
        if node.target is _ATEN._log_softmax_backward_data.default:
            return self._log_softmax_backward(*node.args)
        raise _CannotWidenError

    def _is_narrow(self, value: Tensor | None) -> bool:
        """Return whether a value has the given columns; a size that differs from batch to batch is none of them."""
        size: Any = None if value is None or not value.dim() else value.shape[-1]
        return isinstance(size, int) and size == self._columns

    def _sliced(self, source: Any, *place: Any) -> Node | None:
        """Return what was sliced, if the slice has its first columns and nothing writes to it."""
        value = source.meta.get("val")
        if value is None or view_base(source) in self._written:
            return None
        first_columns = place == (value.dim() - 1, 0, self._columns)
        return source if first_columns and value.shape[-1] == self._full else None

    def _log_softmax(self, node: Node) -> Node:
        """Return ``values - max - log(sum(exp(values - max)))``, PyTorch's own definition, on all columns.

        The columns of padding are minus infinity. The result also takes the place of the narrow one, since sums over
        an aligned number of columns load several elements at a time.
        """
        values, axis, to_float = node.args
        if to_float or not _is_over_columns(axis, node.meta["val"]):
            raise _CannotWidenError
        inside, infinite = self.inside(node.meta["val"], -torch.inf)
        wide = self._call(_ATEN.where.self, inside, self.wide(values), infinite)
        shifted = self._call(
            _ATEN.sub.Tensor, wide, self._call(_ATEN.amax.default, wide, [-1], True)
        )
        exponentials = self._call(_ATEN.exp.default, shifted)
        total = self._call(_ATEN.sum.dim_IntList, exponentials, [-1], True)
        found = self._call(_ATEN.sub.Tensor, shifted, self._call(_ATEN.log.default, total))
        narrow = self._call(_ATEN.slice.Tensor, found, axis, 0, self._columns)
        value = node.meta["val"]
        found.meta["val"] = value.new_empty((*value.shape[:-1], self._full))
        narrow.meta.update(node.meta)
        node.replace_all_uses_with(narrow)
        return found

    def _log_softmax_backward(self, gradient: Any, output: Any, axis: Any, dtype: Any) -> Node:
        """Return ``gradient - exp(output) * sum(gradient)``, PyTorch's own definition."""
        value = output.meta["val"]
        if dtype is not value.dtype or not _is_over_columns(axis, value):
            raise _CannotWidenError
        total = self._call(_ATEN.sum.dim_IntList, gradient, [-1], True)
        probabilities = self._call(_ATEN.exp.default, self.wide(output))
        return self._call(
            _ATEN.sub.Tensor,
            self.wide(gradient),
            self._call(_ATEN.mul.Tensor, probabilities, total),
        )

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        call: Callable[..., Node] = self._graph.call_function
        return call(target, args, kwargs)
