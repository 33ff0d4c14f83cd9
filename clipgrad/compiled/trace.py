"""Trace the clipped step of one microbatch to a graph of plain operations.

The eager step itself is run: capture, rules, hooks, backward pass and plan all happen while the graph is made, and
what is left of them is the tensor operations that they called. Dynamo sees nothing but these, so it has no custom
backward pass and no custom ``vmap`` rule to lose.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from clipgrad.compiled.decompositions import TABLE
from clipgrad.compiled.lengths import Lengths
from clipgrad.compiled.zeroing import zero_in_place
from clipgrad.engine.captured_loss import GraphOfLoss
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings
from clipgrad.engine.inputs import Inputs
from clipgrad.engine.microbatch import run
from clipgrad.engine.whole_batch import WholeBatch
from clipgrad.errors import CompileError, NotPerSampleError

_READS = {
    getattr(torch.Tensor, name)
    for name in ("tolist", "numpy", "__array__", "__dlpack__", "untyped_storage", "storage")
}
_VALUE_READ = (
    "the loss reads the value of a tensor while it runs (.item(), bool(), float(), tolist(), numpy()). A compiled step "
    "would keep the value of the first batch. Keep it a tensor, make it a Python number outside the loss, or leave "
    "compile out."
)


@dataclass(frozen=True)
class Layout:
    """How a piece lies in the flat list of a graph's results.

    Attributes:
        sums: How many sums come first.
        norms: How many norms (clipping groups) follow the values.
        aux: The structure of the auxiliary output.
    """

    sums: int
    norms: int
    aux: Any

    @classmethod
    def flatten(cls, piece: MicrobatchResult) -> tuple[Layout, list[Tensor]]:
        """The layout of a piece, and its tensors in order."""
        aux, structure = tree_flatten(piece.aux)
        assert piece.all_finite is not None, "a traced piece leaves its question open"
        flat = [
            *piece.sums, piece.values, *piece.norms, piece.nonfinite, piece.all_finite, *aux
        ]  # fmt: skip
        return cls(len(piece.sums), len(piece.norms), structure), flat

    def restore(self, flat: Sequence[Tensor], *, aliases_graph: bool) -> MicrobatchResult:
        """The inverse of ``flatten``; ``sums`` may alias a recorded graph's memory."""
        after = self.sums + 1 + self.norms
        return MicrobatchResult(
            list(flat[: self.sums]),
            flat[self.sums],
            list(flat[self.sums + 1 : after]),
            tree_unflatten(list(flat[after + 2 :]), self.aux),
            flat[after],
            flat[after + 1],
            aliases_graph,
        )


@dataclass(frozen=True)
class Graph:
    """A traced step.

    Attributes:
        module: ``module(*params, *batch tensors, *tensors read, is_padding, bounds, *constants)`` returns a flat list.
        layout: What the list holds.
        constants: Tensors that the loss made of Python numbers (``torch.tensor(...)``).
        asks: Whether somebody has to ask if all norms were finite, for else the sums are worthless.
        forgettable: Whether a run leaves nothing behind but its results, so that one in vain does not matter.
    """

    module: GraphModule
    layout: Layout
    constants: tuple[Tensor, ...]
    asks: bool
    forgettable: bool


class _RefuseReads(TorchFunctionMode):
    """Refuse to take values out of a tensor by a road that no dispatcher sees."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _READS:
            raise CompileError(_VALUE_READ)
        return func(*args, **(kwargs or {}))


class _RefuseScalars(TorchDispatchMode):
    """Refuse every operation that turns a value into a Python number, also those that PyTorch calls by itself.

    The tracer does so for tensors that it follows, not for those that the loss finds outside.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags and get_proxy_mode() is not None:
            raise CompileError(_VALUE_READ)
        return func(*args, **(kwargs or {}))


def worth_asking(device: torch.device) -> bool:
    """Whether to ask after each run if all norms were finite. Elsewhere the answer waits for all that is queued.

    Without the question the graph has to take samples out of the factors themselves, which costs a pass over them.
    """
    return device.type == "cpu"


def trace(
    inputs: Inputs,
    loss: GraphOfLoss,
    batch: Sequence[Any],
    is_padding: Tensor,
    bounds: Tensor,
    settings: Settings,
    lengths: Lengths,
) -> Graph:
    """Run the eager step and write down what it does: on real tensors, or on stand-ins if lengths get symbols.

    Args:
        inputs: Names and parameters.
        loss: The captured loss, whose tensors become inputs.
        batch: Flat batch; tensors become inputs, constants are part of the graph.
        is_padding: Boolean ``[B]``.
        bounds: The clipping norms ``[groups]``, an input so that a norm that changes needs no other graph.
        settings: Of the batch.
        lengths: Which sizes of the batch get symbols.

    Raises:
        CompileError: If the loss does something that a graph cannot repeat.
    """
    # Aliases, so that the tracer takes no tensor that has two roles for one input.
    given = [param.detach() for param in inputs.params]
    read = [tensor.detach() for tensor in loss.tensors]
    tensors = [leaf.detach() for leaf in batch if isinstance(leaf, Tensor)]
    layouts: list[Layout] = []
    asks = worth_asking(is_padding.device)

    def step(*flat: Tensor) -> list[Tensor]:
        left = iter(flat[len(given) :])
        rows = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in batch]
        function = loss.loss([next(left) for _ in read])
        with _RefuseScalars():
            *_, mask, norms = flat
            clipping = settings.clipping.reading(norms)
            now = replace(settings, deferred=True, selects=not asks, clipping=clipping)
            piece = run(function, inputs.names, flat[: len(given)], rows, mask, now)
        layout, results = Layout.flatten(piece)
        layouts.append(layout)
        return results

    arguments = [*given, *tensors, *read, is_padding, bounds]
    if lengths.mode is not None:
        arguments = lengths.with_symbols(given, tensors, [*read, is_padding, bounds])
    with ExitStack() as stack:
        stack.enter_context(_RefuseReads())
        stack.enter_context(_explained())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if lengths.mode is not None:
            stack.enter_context(lengths.mode)
            stack.enter_context(WholeBatch())
        module = make_fx(step, decomposition_table=TABLE)(*arguments)
    constants = _lift_constants(module)
    forgettable = not any(_draws(node) or _writes_outside(node) for node in module.graph.nodes)
    zero_in_place(module)
    return Graph(module, layouts[0], constants, asks, forgettable)


_KNOWN = {"aten", "prims", "clipgrad"}


def _draws(node: Node) -> bool:
    """Whether a node may draw random numbers. Operations of others do not have to say so."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in _KNOWN:
        return True
    return torch.Tag.nondeterministic_seeded in target.tags


def _writes_outside(node: Node) -> bool:
    """Whether a node writes to an argument of the graph, or to a view of one."""
    return any(_root(argument).op == "placeholder" for argument in _shared(node, written=True))


def _root(node: Node) -> Node:
    """What a view is a view of."""
    while bases := _shared(node, written=False):
        node = bases[0]
    return node


def _shared(node: Node, *, written: bool) -> list[Node]:
    """The arguments that an operation writes to, or whose memory its result may share."""
    if not isinstance(node.target, OpOverload):
        return list(node.args[:1]) if node.target is operator.getitem and not written else []  # type: ignore[arg-type]
    described = zip(node.target._schema.arguments, node.args, strict=False)
    return [
        value
        for argument, value in described
        if isinstance(value, Node)
        and argument.alias_info is not None
        and (argument.alias_info.is_write or not written)
    ]


def _lift_constants(module: GraphModule) -> tuple[Tensor, ...]:
    """Make inputs of the tensors that the graph holds, so that it always reads them as they are now."""
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    constants: dict[str, tuple[Tensor, Any]] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in constants:
            value = getattr(module, node.target)
            if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
                raise CompileError(
                    f"the traced step holds a {type(value).__name__} that cannot be an input of a graph (a "
                    "torch.cond or a loop operator inside the loss?). Leave compile out."
                )
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(constants)}")
            last.meta.update(node.meta)
            constants[node.target] = (value, last)
        node.replace_all_uses_with(constants[node.target][1])
        graph.erase_node(node)
    graph.set_codegen(CodeGen())
    graph.eliminate_dead_code()
    for name in constants:
        delattr(module, name)
    module.recompile()
    return tuple(value for value, _ in constants.values())


@contextmanager
def _explained() -> Iterator[None]:
    """The eager step ran just before, so whatever fails here fails because of the trace."""
    try:
        yield
    except (CompileError, NotPerSampleError):
        raise
    except Exception as error:
        if isinstance(error.__cause__, CompileError):
            raise error.__cause__ from None
        told = f"{error} {error.__cause__}"
        if "get value out of a tracing tensor" in told:
            raise CompileError(_VALUE_READ) from error
        raise CompileError(
            f"the step runs, but cannot be traced to a graph ({type(error).__name__}: {error}). Leave compile out for "
            "this loss."
        ) from error
