"""Let the compiler set rows of a tensor to zero in place, if no operation reads the tensor afterwards."""

from __future__ import annotations

import operator

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import GraphModule

from clipgrad.kernels import selection  # noqa: F401 - registers the operations


def zero_in_place(module: GraphModule) -> None:
    """Rewrite every selection by zeroing as a functionalized in-place operation.

    This is the compiler's own form for operations that write: a write to a copy. The compiler removes the copy if the
    graph itself made the tensor and neither returns it nor reads it again.
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
        result.meta.update(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    if selections:
        module.recompile()
