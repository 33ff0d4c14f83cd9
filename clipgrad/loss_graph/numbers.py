"""Let a graph take Python floats that change between calls as inputs, so that each value needs no new graph.

PyTorch passes such a float to a graph as a tensor and reads its value there, which a later trace cannot follow. Here
the graph takes the float itself. If a float is used only in arithmetic, the graph also accepts a tensor in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from clipgrad.loss_graph.checkpoints import Checkpoint


def _arithmetic(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return the operation in a form that also accepts a float64 tensor without axes in place of a float."""

    def calculate(a: Any, b: Any, is_number: tuple[bool, bool]) -> Any:
        pairs = list(zip((a, b), is_number, strict=True))
        values = [value for value, number in pairs if isinstance(value, Tensor) and not number]
        if not values or not any(isinstance(value, Tensor) for value, number in pairs if number):
            return operation(a, b)
        dtype = values[0].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            dtype = torch.get_default_dtype()
        # PyTorch computes half-precision tensors with a float in float32. A float never widens a tensor's dtype.
        within = torch.promote_types(dtype, torch.float32)
        a, b = (value.to(within) if isinstance(value, Tensor) else value for value in (a, b))
        return operation(a, b).to(dtype)

    calculate.__name__ = calculate.__qualname__ = operation.__name__
    return calculate


_FUNCTIONS = {
    function: _arithmetic(getattr(operator, name))
    for name, functions in {
        "add": (operator.add, torch.add),
        "sub": (operator.sub, torch.sub),
        "mul": (operator.mul, torch.mul),
        "truediv": (operator.truediv, torch.div, torch.true_divide),
        "pow": (operator.pow, torch.pow),
    }.items()
    for function in functions
}
_METHODS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow}  # fmt: skip


def take_numbers(module: GraphModule) -> dict[Node, bool]:
    """Let a graph take floats instead of the tensors from which it reads them.

    Returns:
        The inputs that are floats, and for each input whether a tensor without axes is accepted in its place.
    """
    graph = module.graph
    found: dict[Node, set[Node]] = {}  # For each float in the graph: the inputs that it depends on.
    rigid: set[Node] = set()
    for node in list(graph.nodes):
        place = node.args[0] if node.target == "item" and node.op == "call_method" else None
        if isinstance(place, Node) and place.op == "placeholder" and _is_number(node):
            place.meta["example_value"] = node.meta["example_value"].node.hint
            node.replace_all_uses_with(place)
            graph.erase_node(node)
            found[place] = {place}
    regions = {node: _taken_by_region(module, node) for node in graph.find_nodes(op="call_module")}
    for taken in regions.values():
        for place, (example, serves) in taken.items():
            place.meta["example_value"] = example
            found[place] = {place}
            rigid |= set() if serves else {place}
    inputs = list(found)
    calculations = []
    for node in graph.nodes:
        given = [arg for arg in node.all_input_nodes if arg not in regions.get(node, ())]
        origins = {origin for arg in given for origin in found.get(arg, ())}
        if not origins or node in found:
            continue
        if _calculation(node) is None:
            rigid |= origins
        else:
            calculations.append(node)
        if _is_number(node):
            found[node] = origins
    for node in calculations:
        is_number = tuple(not isinstance(arg, Node) or arg in found for arg in node.args)
        with graph.inserting_before(node):
            new = graph.call_function(_calculation(node), (*node.args, is_number))  # type: ignore[arg-type]
        new.meta = dict(node.meta)
        if node in found:
            found[new] = found[node]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    module.recompile()
    return {place: place not in rigid for place in inputs}


def _taken_by_region(module: GraphModule, node: Node) -> dict[Node, tuple[Any, bool]]:
    """Return the graph's inputs that a checkpointed region reads as floats.

    Each input has an example value, and whether a tensor is accepted in its place.
    """
    region = module.get_submodule(str(node.target))
    if not isinstance(region, Checkpoint):
        return {}
    inner = take_numbers(region.body)
    places = region.body.graph.find_nodes(op="placeholder")
    return {
        arg: (place.meta["example_value"], inner[place])
        for arg, place in zip(node.args, places, strict=True)
        if place in inner and isinstance(arg, Node) and arg.op == "placeholder"
    }


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymFloat)


def _calculation(node: Node) -> Callable[..., Any] | None:
    """Return the function of ``_FUNCTIONS`` that computes the node, or None."""
    target: Any = node.target
    if node.op == "call_method":
        target = _METHODS.get(target)
    if len(node.args) != 2 or node.kwargs or node.op not in ("call_method", "call_function"):
        return None
    return _FUNCTIONS.get(target)
