"""This module makes a captured graph a pure function of parameters, the sample's leaves and all other tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import TreeSpec, tree_unflatten

from clipgrad.loss_graph.checkpoints import CHECKPOINT, rebuild_checkpoint, refuse_lost_gradients
from clipgrad.loss_graph.functions import CUSTOM_FUNCTION, rebuild_custom_function
from clipgrad.loss_graph.reasons import CannotCapture, line_in
from clipgrad.loss_graph.regions import close_regions, rewrite_regions


class Place(NamedTuple):
    """This tuple says where a value comes from.

    Attributes:
        kind: parameter, leaf, constant, output or value.
        index: Position among the values of this kind; for the kind "value", the value itself.
    """

    kind: str
    index: Any


@dataclass(frozen=True)
class CapturedLoss:
    """This class holds the graph for a call, and the present values of its other inputs.

    Attributes:
        module: A function from one value for each of ``inputs`` to a tuple of tensors.
        number: Equal for two calls exactly if module, inputs and results are the same.
        inputs: Place of each input of the graph.
        results: Place of the loss, and then of each leaf of the auxiliary output.
        aux: Structure of the auxiliary output; None if there is none.
        constants: Present value of each input that is neither parameter nor leaf: a tensor, or a number.
        changes_state: Whether the loss changes an outer object, so that the next call may need another graph.
        lifted: Positions of the constants that are numbers, but may be given as tensors without axes.
    """

    module: GraphModule
    number: int
    inputs: tuple[Place, ...]
    results: tuple[Place, ...]
    aux: TreeSpec | None
    constants: list[Tensor | int | float]
    changes_state: bool = False
    lifted: frozenset[int] = frozenset()

    def __call__(
        self,
        parameters: Sequence[Tensor],
        leaves: Sequence[Any],
        constants: Sequence[Tensor | int | float],
    ) -> tuple[Tensor, Any]:
        """Run the graph; under ``torch.func.vmap`` each argument may differ from sample to sample.

        Args:
            parameters: Parameters in the order of the capture; those that the graph does not need are not read.
            leaves: Leaves of one sample, in the order of the capture.
            constants: Usually ``self.constants``.

        Returns:
            The loss, and the auxiliary output or None.
        """
        given = {"parameter": parameters, "leaf": leaves, "constant": constants}
        with close_regions():
            outputs = self.module(*(given[kind][index] for kind, index in self.inputs))
        given["output"] = outputs
        values = [given[kind][index] if kind in given else index for kind, index in self.results]
        aux = None if self.aux is None else tree_unflatten(values[1:], self.aux)
        return values[0], aux


def make_pure(module: GraphModule) -> GraphModule:
    """The graph in a form that runs under ``vmap``; PyTorch still reads its own, which stays.

    Raises:
        CannotCapture: If it holds what does not run there.
    """
    graph = copy.deepcopy(module.graph)
    module = GraphModule(module, graph)
    for node in list(graph.nodes):
        _refuse(module, node)
    for node in list(graph.nodes):
        if node.target is CHECKPOINT:
            rebuild_checkpoint(module, graph, node)
        elif node.target is CUSTOM_FUNCTION:
            rebuild_custom_function(module, graph, node, line_in(node.meta.get("stack_trace")))
    rewrite_regions(graph)
    _lengths_from_tensors(graph)
    graph.lint()
    module.recompile()
    return module


def remove_unused_inputs(module: GraphModule) -> tuple[int, ...]:
    """Remove unused inputs of a graph, and return the positions of the others."""
    places = list(module.graph.find_nodes(op="placeholder"))
    for place in places:
        if not place.users:
            module.graph.erase_node(place)
    left = set(module.graph.find_nodes(op="placeholder"))
    module.recompile()
    return tuple(position for position, place in enumerate(places) if place in left)


def forget_examples(module: GraphModule) -> None:
    """Drop the example tensors that PyTorch stored at the nodes, and keep source lines for messages."""
    for child in module.modules():
        if isinstance(child, GraphModule):
            for node in child.graph.nodes:
                node.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}


def _refuse(module: GraphModule, node: Node) -> None:
    where = line_in(node.meta.get("stack_trace"))
    if node.op == "get_attr":
        held: Any = module
        for name in str(node.target).split("."):
            held = getattr(held, name)
        if isinstance(held, GraphModule):
            setattr(module, str(node.target), make_pure(held))
        else:
            raise CannotCapture(f"it holds {type(held).__name__} as a constant of the graph", where)
    target: Any = node.target
    known = target is CHECKPOINT or target is CUSTOM_FUNCTION
    if isinstance(target, torch._ops.HigherOrderOperator) and not known:
        raise CannotCapture(f"it uses {target.name()}, which cannot run per sample", where)
    if target is CHECKPOINT:
        refuse_lost_gradients(node, where)
    if node.op == "call_method" and str(node.target).startswith("register_"):
        raise CannotCapture(
            f"it calls {node.target}; a hook would see the gradients of all samples at once", where
        )
    if free_unbacked_symbols(node.meta.get("example_value")):
        raise CannotCapture(
            "it reads the value of a tensor, or makes one whose shape depends on the data", where
        )


def _lengths_from_tensors(graph: torch.fx.Graph) -> None:
    """Replace inputs that are changing lengths by the size of an input tensor with this length."""
    places = list(graph.find_nodes(op="placeholder"))
    for place in places:
        symbol = place.meta.get("example_value")
        if not isinstance(symbol, torch.SymInt):
            continue
        for owner in places:
            value = owner.meta.get("example_value")
            if not isinstance(value, Tensor):
                continue
            same = [axis for axis, size in enumerate(value.shape) if _is_length(size, symbol)]
            if same and place.users:
                with graph.inserting_after(places[-1]):
                    length = graph.call_method("size", (owner, same[0]))
                length.meta["example_value"] = symbol
                place.replace_all_uses_with(length)
                break


def _is_length(size: Any, symbol: torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == symbol.node.expr)
