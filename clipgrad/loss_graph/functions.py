"""This module rebuilds custom ``autograd.Function``s of a graph so that forward and backward run per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from clipgrad.loss_graph.reasons import CannotCapture

CUSTOM_FUNCTION = torch.ops.higher_order.autograd_function_apply


class CustomFunction(nn.Module):
    """This module calls an ``autograd.Function`` made of two graphs, so that PyTorch can derive its ``vmap`` rule.

    Args:
        forward: Graph from the arguments to outputs and saved values.
        backward: Graph from output gradients and saved values to a gradient or None for each argument.
        differentiable: For each output, whether it has a gradient.
    """

    def __init__(
        self, forward: GraphModule, backward: GraphModule, differentiable: Sequence[bool]
    ) -> None:
        super().__init__()
        self.saved_values = _saved_values(forward)
        self.forward_graph, self.backward_graph = forward, backward
        self._function = _make_function(forward, backward, self.saved_values, differentiable)

    def forward(self, *args: Any) -> tuple[Any, ...]:
        """Run the function on the graph's arguments."""
        outputs: tuple[Any, ...] = self._function.apply(*args)
        return outputs[: len(self.saved_values.outputs)]


class _SavedValues:
    """This class knows the source of each value that backward needs: an argument, an output, or an extra result."""

    def __init__(
        self, outputs: Sequence[Node], saved: Sequence[Node], inputs: Sequence[Node]
    ) -> None:
        self.outputs, self.saved = list(outputs), list(saved)
        self.inputs = list(inputs)
        known = {*self.inputs, *self.outputs}
        self.made = [node for node in dict.fromkeys(saved) if node not in known]

    def values(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        """Return the saved values; the extra results follow the outputs."""
        known = dict(zip(self.inputs, inputs, strict=True))
        known |= dict(zip([*self.outputs, *self.made], outputs, strict=True))
        return [known[node] for node in self.saved]


def _saved_values(forward: GraphModule) -> _SavedValues:
    (output,) = forward.graph.find_nodes(op="output")
    outputs, saved = output.args[0]
    inputs = list(forward.graph.find_nodes(op="placeholder"))
    nodes = [*outputs, *saved]
    if not all(isinstance(node, Node) for node in nodes) or set(outputs) & set(inputs):
        raise CannotCapture(
            "it uses a custom autograd.Function that saves or returns other values than results"
        )
    return _SavedValues(outputs, saved, inputs)


def _make_function(
    forward_graph: GraphModule,
    backward_graph: GraphModule,
    saved_values: _SavedValues,
    differentiable: Sequence[bool],
) -> type[torch.autograd.Function]:
    count = len(saved_values.outputs)

    class Captured(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Any, ...]:
            # The graph sets the grad mode and does not restore it.
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                outputs, saved = forward_graph(*args)
            by_node = dict(zip(saved_values.saved, saved, strict=True))
            return (*outputs, *(by_node[node] for node in saved_values.made))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            marked = [value for value, yes in zip(output, differentiable, strict=False) if not yes]
            ctx.mark_non_differentiable(*marked, *output[count:])
            ctx.save_for_backward(*inputs, *output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            values = ctx.saved_tensors
            inputs, outputs = values[: len(saved_values.inputs)], values[len(saved_values.inputs) :]
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                found = backward_graph(*gradients[:count], *saved_values.values(inputs, outputs))
            return found if isinstance(found, tuple | list) else (found,)

    return Captured


def rebuild_custom_function(
    module: GraphModule, graph: Graph, node: Node, where: str | None
) -> None:
    """Replace PyTorch's operation for custom functions, which does not run per sample, by a call of a module.

    Raises:
        CannotCapture: If the function writes to its arguments, or has arguments that are not tensors.
    """
    forward, backward, *args = node.args
    assert isinstance(forward, Node)
    assert isinstance(backward, Node)
    tensors = all(
        isinstance(arg, Node) and isinstance(arg.meta.get("example_value"), Tensor) for arg in args
    )
    if node.kwargs.get("dirty_idx") or not tensors:
        raise CannotCapture(
            "it uses a custom autograd.Function that takes numbers or writes to its arguments",
            where,
        )
    bodies = [getattr(module, str(body.target)) for body in (forward, backward)]
    hidden = node.kwargs["non_differentiable_idx"]
    count = len(_saved_values(bodies[0]).outputs)
    name = f"custom_function_{node.name}"
    module.add_module(
        name,
        CustomFunction(bodies[0], bodies[1], [index not in hidden for index in range(count)]),  # type: ignore[operator]
    )
    with graph.inserting_before(node):
        call = graph.call_module(name, tuple(args))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    for old in (node, forward, backward):
        if not old.users:
            graph.erase_node(old)
