"""Let a compiler write to a tensor that samples are taken out of, if nobody reads it afterwards."""

from __future__ import annotations

import operator

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import GraphModule

from clipgrad.kernels import selection  # noqa: F401 - registers the operations


def zero_in_place(module: GraphModule) -> None:
    """Say of every last selection that it is a copy of the tensor, to which an operation has written.

    That is the compiler's own way to hold an operation that writes. It decides whether the copy is needed: not for what
    the graph made itself and neither returns nor reads again.

    Args:
        module: A traced graph, which is changed.
    """
    graph, operations = module.graph, torch.ops.clipgrad
    selections = graph.find_nodes(op="call_function", target=operations.selected_by_zeroing.default)
    for node in selections:
        tensor, keep = node.args
        with graph.inserting_before(node):
            written = graph.call_function(
                auto_functionalized,
                (operations.zero_rows_.default,),
                {"tensor": tensor, "keep": keep},
            )
            result = graph.call_function(operator.getitem, (written, 1))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    if selections:
        module.recompile()
