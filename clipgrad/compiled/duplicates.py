"""Compute equal expressions of a traced graph once.

Under autocast each layer casts its input for itself: a transformer's query, key and value layers cast the same tensor,
and a ViT-B/16 held three copies of it per layer. TorchInductor writes a copy for each, since it looks for equal
expressions only where it divides a graph in forward and backward pass. PyTorch's function for this (``fx_graph_cse``)
would also merge tensors that an operation writes to later.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from clipgrad.compiled.randomness import may_be_random
from clipgrad.compiled.views import bases_read_by_stride, view_base, written_bases


def merge_equal(module: GraphModule) -> None:
    """Let every operation with the same arguments as an earlier one use the earlier result.

    Results of the graph stay apart, and so do tensors that share memory with what an operation writes to. What
    ``as_strided`` reads stays apart as well, since views of it may not become copies for the compiler.
    """
    graph = module.graph
    if any(isinstance(node.target, HigherOrderOperator) for node in graph.nodes):
        return  # these may write to their arguments, and their schema does not say so
    written = written_bases(graph)
    results = {view_base(node) for node in graph.output_node().all_input_nodes}
    apart = written | results | bases_read_by_stride(graph)
    known: dict[tuple[object, str, str], Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or may_be_random(node) or _widens(node):
            continue
        # A text would not tell tensors apart.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((node.args, node.kwargs))):
            continue
        if view_base(node) in apart or not written.isdisjoint(map(view_base, node.all_input_nodes)):
            continue
        # Names of nodes are unique, and texts tell 1 from 1.0 and True.
        key = node.target, repr(node.args), repr(node.kwargs)
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    module.recompile()


def _widens(node: Node) -> bool:
    """Return whether a node copies a tensor to more bytes per element.

    The compiler makes such a copy wherever it reads the tensor. One copy for all readers would be held from the forward
    pass to the end: 2 GiB for ViT-B/16 on a CPU.
    """
    if node.target is not torch.ops.aten._to_copy.default:
        return False
    sources = node.all_input_nodes  # none if it makes a tensor of a number
    return any(
        node.meta["val"].element_size() > source.meta["val"].element_size() for source in sources
    )
