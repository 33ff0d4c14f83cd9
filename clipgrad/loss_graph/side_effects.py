"""This module refuses graphs that write to their inputs, or store tensors outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipgrad.loss_graph.checkpoints import checkpoints_of
from clipgrad.loss_graph.reasons import CannotCapture, line_in, line_of
from clipgrad.loss_graph.regions import close_regions


def refuse_side_effects() -> bool:
    """Refuse a loss that stores a tensor outside; call this function while PyTorch compiles the graph.

    After running a graph, PyTorch repeats the code's changes to outer objects. Here this would store placeholders
    instead of results, or a value of one sample that a later batch reads.

    Returns:
        Whether the loss changes an outer object, so that the next call may find another state. A recurrent layer does
        not count: it stores references to its weights, which are restored after each call.

    Raises:
        CannotCapture: If the loss stores a tensor; the error names the line.
    """
    translator = InstructionTranslator.current_tx()
    effects = translator.output.side_effects
    if effects.tensor_hooks:
        raise CannotCapture("it registers a hook on a tensor that it was given")
    changed = [owner for owner in effects._get_modified_vars() if owner.source is not None]
    for owner in changed:
        place = owner.source.name  # type: ignore[union-attr]
        place = place() if callable(place) else place
        for value in _stored(owner, effects.store_attr_mutations.get(owner, {})):
            source = value.source.name if value.source is not None else None
            source = source() if callable(source) else source
            there = source is not None and source.startswith((f"{place}[", f"{place}."))
            if not (there or _is_held(translator.output.root_tx, place, source)):
                stacks = getattr(effects, "mutation_user_stacks", {}).get(owner)
                where = line_of(stacks[-1]) if stacks else None
                raise CannotCapture(
                    f"it stores a tensor in {type_of(owner)}, where a later batch would find it (if only its first "
                    "call does so, run the model once before training, on a made-up batch)",
                    where,
                )
    return not all(map(_is_recurrent_layer, changed))


def _is_recurrent_layer(owner: Any) -> bool:
    try:
        return issubclass(owner.python_type(), torch.nn.RNNBase)
    except NotImplementedError:
        return False


def _is_held(root: Any, place: str, source: str | None) -> bool:
    """Return whether a dictionary held this tensor before the loss ran; ``functional_call`` restores parameters so.

    Args:
        root: PyTorch's translator of the loss, with its variables.
        place: PyTorch's expression for the dictionary.
        source: PyTorch's expression for the tensor; None if the loss computed it.
    """
    if source is None:
        return False
    names = {"L": root.f_locals, "G": root.f_globals}
    try:
        container, tensor = (eval(text, names) for text in (place, source))
    except Exception:  # an expression with functions of PyTorch's guards
        return False
    return isinstance(container, dict) and any(tensor is held for held in container.values())


def type_of(owner: Any) -> str:
    """Describe an object for a message."""
    try:
        return f"an object of type {owner.python_type().__name__}"
    except NotImplementedError:
        return "an object outside of it"


def _stored(owner: Any, attributes: dict[str, Any]) -> list[Any]:
    """Return the tensors that the loss stored in an object."""
    from torch._dynamo.variables import LazyVariableTracker, TensorVariable
    from torch._dynamo.variables.base import VariableTracker

    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, LazyVariableTracker) and not value.is_realized():
            return  # the loss did not read it
        if isinstance(value, TensorVariable):
            found.append(value)

    VariableTracker.visit(look, [owner, attributes])
    return found


class _Writes(TorchDispatchMode):
    """This mode refuses operations that write to the memory of an input."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node: Node | None = None
        self.drawing: set[Any] = set()
        self._memory = {_memory(value) for value in inputs if isinstance(value, Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and self.node is not None:
            self.drawing.add(self.node.target)
        for value in _written(func, args, kwargs):
            if _memory(value) in self._memory:
                where = line_in(self.node.meta.get("stack_trace")) if self.node else None
                raise CannotCapture(
                    f"it writes in place to a tensor that it was given ({func._schema.name})", where
                )
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    written = {
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    if "batch_norm" in func._schema.name and (given.get("training") or given.get("train")):
        written |= {"running_mean", "running_var"}  # some schemas do not declare these writes
    for name in written:
        yield from (one for one in tree_leaves(given.get(name)) if isinstance(one, Tensor))


class _Run(Interpreter):
    def __init__(self, module: GraphModule, writes: _Writes) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._writes = writes

    def run_node(self, n: Node) -> Any:
        self._writes.node = n
        return super().run_node(n)


def refuse_writes(module: GraphModule) -> None:
    """Refuse a graph that writes to its inputs; the graph runs once on fake tensors.

    The run also tells which checkpointed regions draw random numbers.

    Args:
        module: The captured graph, with an example at each input.

    Raises:
        CannotCapture: If the graph writes to an input; the error names the line.
    """
    examples = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    modes = [value.fake_mode for value in examples if hasattr(value, "fake_mode")]
    if not modes:
        return
    writes = _Writes(examples)
    # What this run asks of a symbolic length says nothing about the loss, and must not tie the graph to one length.
    shapes = modes[0].shape_env
    unguarded = nullcontext() if shapes is None else shapes.suppress_guards()
    with unguarded, torch.enable_grad(), modes[0], writes, close_regions():
        _Run(module, writes).run(*examples, enable_io_processing=False)
    for name, child in module.named_children():
        for region in checkpoints_of(child):
            region.draws = name in writes.drawing
