"""This module finds what shares memory in a traced graph, and lets views copy where the compiler changes strides."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
# PyTorch's schema does not say that the results of these share memory.
_UNDECLARED_VIEWS = (
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
)
# These read the whole memory of their first argument, also elements that the argument itself does not have.
_READ_MEMORY = (
    torch.ops.aten.as_strided.default,
    torch.ops.aten.as_strided_copy.default,
    torch.ops.aten.as_strided_scatter.default,
)


def _aliased_arguments(node: Node, *, written: bool) -> list[Node]:
    """Return the arguments that an operation writes to, or whose memory its result may share."""
    if not isinstance(node.target, OpOverload):
        return list(node.args[:1]) if node.target is operator.getitem and not written else []  # type: ignore[arg-type]
    if node.target in _UNDECLARED_VIEWS and not written:
        return list(node.args[:1])  # type: ignore[arg-type]
    parameters = node.target._schema.arguments
    by_name = {parameter.name: parameter for parameter in parameters}
    given = [
        *zip(parameters, node.args, strict=False),
        *((by_name[name], value) for name, value in node.kwargs.items()),
    ]
    return [
        value
        for parameter, argument in given
        if parameter.alias_info is not None and (parameter.alias_info.is_write or not written)
        for value in (argument if isinstance(argument, Sequence) else [argument])
        if isinstance(value, Node)
    ]


def view_base(node: Node) -> Node:
    """Return the node whose memory a view shares."""
    while bases := _aliased_arguments(node, written=False):
        node = bases[0]
    return node


def written_bases(graph: Graph) -> set[Node]:
    """Return the nodes whose memory an operation of the graph writes to."""
    return {
        view_base(argument)
        for node in graph.nodes
        for argument in _aliased_arguments(node, written=True)
    }


def bases_read_by_stride(graph: Graph) -> set[Node]:
    """Return the nodes whose memory an operation reads by strides of its own."""
    return {
        view_base(node.args[0])
        for operation in _READ_MEMORY
        for node in graph.find_nodes(op="call_function", target=operation)
    }


def let_views_copy(module: GraphModule) -> None:
    """Make every view a ``reshape``, which copies a tensor that has no such view.

    A view that was possible in the trace may be impossible in the compiler. The compiler replaces some operations by
    others whose results have other strides: ``cat`` of one tensor and empty ones keeps the tensor's strides, whereas
    the operation itself returns a contiguous tensor. A view stays as it is if its memory is written to, because a
    write to a copy would be lost. It also stays if ``as_strided`` reads its memory, where a copy has other elements.
    """
    graph = module.graph
    stays = written_bases(graph) | bases_read_by_stride(graph)
    for view in VIEWS:
        for node in graph.find_nodes(op="call_function", target=view):
            if view_base(node) not in stays:
                node.target = torch.ops.aten.reshape.default
    module.recompile()
