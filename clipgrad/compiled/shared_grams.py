"""Compute one Gram matrix of an input that several layers share.

The norm of a linear layer's per-sample gradient is a sum over the product of two Gram matrices: of the input and of the
output's gradient. Query, key and value layers have the same input, and so have the two first layers of a gated MLP.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import GraphModule, Node

from clipgrad.kernels.half_products import HALF
from clipgrad.rules.gram import of_several

_DEVICES = {"cuda"}  # elsewhere no kernel computes several at once


def share_grams(module: GraphModule) -> None:
    """Join the norms of left factors with the same right factor.

    A left factor takes part if it is known where the first of these norms is computed. Factors are of half precision:
    for float32 the kernel would need more registers than there are.
    """
    graph = module.graph
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=torch.ops.clipgrad.gram_sums.default):
        if all(_suits(factor) for factor in node.args):
            groups[node.args[1]].append(node)
    found = False
    for right, nodes in groups.items():
        first, *others = nodes  # in the order of the graph, in which nodes are compared
        joined = [first, *(node for node in others if node.all_input_nodes[0] < first)]
        if len(joined) == 1:
            continue
        found = True
        lefts = [node.args[0] for node in joined]
        with graph.inserting_before(first):
            parts = graph.call_function(of_several._opoverload, (lefts, right))
            value = first.meta["val"]
            parts.meta["val"] = value.new_empty(len(joined), *value.shape)
            for number, node in enumerate(joined):
                own = graph.call_function(torch.ops.aten.select.int, (parts, 0, number))
                own.meta.update(node.meta)
                node.replace_all_uses_with(own)
        for node in joined:
            graph.erase_node(node)
    if found:
        module.recompile()


def _suits(factor: Node) -> bool:
    value: torch.Tensor = factor.meta["val"]
    return value.device.type in _DEVICES and value.dtype in HALF
