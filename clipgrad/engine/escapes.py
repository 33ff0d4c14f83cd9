"""Refuse an autograd graph with a leaf that the tape does not know, since its gradient would escape clipping."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clipgrad.engine import refused_nodes
from clipgrad.engine.tape import Tape
from clipgrad.errors import EscapedParameterError


def escape_message(name: str, operation: str) -> str:
    """Return the error message for a parameter that an operation uses without the tape."""
    return (
        f"parameter {name!r} reached {operation} from outside the transform (held in a list, a closure or an "
        "attribute that is not a registered parameter), so its gradient would escape clipping. Read it through "
        "the model or the params argument inside the loss: register it as nn.Parameter or in nn.ParameterList."
    )


def refuse_escapes(
    tape: Tape, values: Sequence[Tensor], params: Sequence[Tensor], inputs: Sequence[Tensor] = ()
) -> None:
    """Walk the graph of the next backward pass, and refuse leaves that would receive an unclipped gradient.

    The capture sees operations. This walk also finds leaves that the capture cannot see, such as those of a custom
    ``autograd.Function`` or of a C++ extension.

    Args:
        tape: The tape of the microbatch, whose leaves are allowed.
        values: Tensors at which the backward pass begins.
        params: The parameter tensors that the caller passed, for the message.
        inputs: Further leaves that are allowed.

    Raises:
        EscapedParameterError: If the graph has another leaf.
    """
    ours = {id(entry.leaf) for entry in tape.tracked} | {id(tape.anchor), *map(id, inputs)}
    seen = set()
    stack = [value.grad_fn for value in values]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind in refused_nodes.WRONG:
            refused_nodes.refuse(node, tape.corrected)
        variable = node.variable if kind == "AccumulateGrad" else None  # type: ignore[attr-defined]
        if variable is not None and id(variable) not in ours:
            for entry, original in zip(tape.tracked, params, strict=False):
                if variable is original:
                    raise EscapedParameterError(escape_message(entry.name, "the loss"))
            raise EscapedParameterError(
                f"the loss depends on a tensor of shape {tuple(variable.shape)} that requires grad and is not "
                "among the parameters, so its gradient would escape clipping. Pass it with the parameters, "
                "register it in the model, or detach it."
            )
        stack.extend(following for following, _ in node.next_functions)
