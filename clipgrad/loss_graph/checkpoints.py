"""Turn regions of ``torch.utils.checkpoint`` into modules of the graph, so that the engine can run them again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from clipgrad.kernels.region import run_region
from clipgrad.loss_graph.reasons import CannotCapture

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Checkpoint(nn.Module):
    """This module holds the body of a region, whose arguments are all the values that it reads.

    Args:
        body: A pure graph.
    """

    def __init__(self, body: GraphModule) -> None:
        super().__init__()
        self.body = body
        self.draws = (
            True  # loss_graph/side_effects.py sets False if the body draws no random numbers.
        )

    def forward(self, *args: Any) -> Any:
        """Run the region."""
        return run_region(self.body, self.draws, *args)


def refuse_lost_gradients(node: Node, where: str | None) -> None:
    """Refuse a reentrant checkpoint in which PyTorch would lose gradients.

    Raises:
        CannotCapture: If no input that the loss computed requires grad.
    """
    computed = [arg for arg in node.all_input_nodes if arg.op not in ("placeholder", "get_attr")]
    examples = [arg.meta.get("example_value") for arg in computed]
    kept = any(isinstance(value, Tensor) and value.requires_grad for value in examples)
    if node.kwargs.get("use_reentrant") and not kept:
        raise CannotCapture(
            "no input of its checkpoint requires grad, so PyTorch would lose the gradients of all parameters inside; "
            "pass use_reentrant=False",
            where,
        )


def rebuild_checkpoint(module: GraphModule, graph: Graph, node: Node) -> None:
    """Replace PyTorch's operation for checkpoints, which only its compiler can run, by a call of a module."""
    body = node.args[0]
    assert isinstance(body, Node)
    name = str(body.target)
    held = getattr(module, name)
    if not isinstance(held, Checkpoint):
        setattr(module, name, Checkpoint(held))
    with graph.inserting_before(node):
        call = graph.call_module(name, node.args[1:])
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)


def checkpoints_of(module: nn.Module) -> Iterator[Checkpoint]:
    """Return all regions of a graph, including nested ones."""
    return (child for child in module.modules() if isinstance(child, Checkpoint))
