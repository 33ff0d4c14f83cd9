"""This module traces the clipped step of one microbatch to a graph of plain operations.

The trace runs the eager step: capture, rules, hooks, backward pass and choice of strategies. The graph holds only the
tensor operations that they called, so the compiler sees no custom backward pass and no custom ``vmap`` rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from clipgrad.compiled.decompositions import DECOMPOSITIONS
from clipgrad.compiled.duplicates import merge_equal
from clipgrad.compiled.lengths import Lengths
from clipgrad.compiled.padded_outputs import pad_last
from clipgrad.compiled.position_sums import sum_apart
from clipgrad.compiled.randomness import may_be_random
from clipgrad.compiled.shared_grams import share_grams
from clipgrad.compiled.views import written_bases
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
    """This class describes the flat list of a graph's results.

    Attributes:
        sums: Number of sums, which come first.
        norms: Number of norms (clipping groups), which follow the losses.
        aux: Structure of the auxiliary output.
    """

    sums: int
    norms: int
    aux: Any

    @classmethod
    def flatten(cls, piece: MicrobatchResult) -> tuple[Layout, list[Tensor]]:
        """Return the layout of a result, and its tensors in order."""
        aux, structure = tree_flatten(piece.aux)
        assert piece.all_finite is not None, "a traced step returns whether all norms are finite"
        flat = [
            *piece.sums, piece.values, *piece.norms, piece.nonfinite, piece.all_finite, *aux
        ]  # fmt: skip
        return cls(len(piece.sums), len(piece.norms), structure), flat

    def restore(self, flat: Sequence[Tensor], *, aliases_graph: bool) -> MicrobatchResult:
        """Invert ``flatten``; ``sums`` may alias the memory of a CUDA graph."""
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
class TracedStep:
    """This class holds a traced step.

    Attributes:
        module: ``module(*params, *batch tensors, *tensors read, is_padding, bounds, *constants)`` returns a flat list.
        layout: Layout of the list.
        constants: Tensors that the loss made from Python numbers (``torch.tensor(...)``).
        needs_finite_check: Whether the caller must check that all norms are finite; if not, the sums are invalid.
        has_no_side_effects: Whether a run changes nothing but its results, and draws no random numbers.
    """

    module: GraphModule
    layout: Layout
    constants: tuple[Tensor, ...]
    needs_finite_check: bool
    has_no_side_effects: bool


class _RefuseReads(TorchFunctionMode):
    """This mode refuses functions that read a tensor's values and that no dispatch mode sees."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _READS:
            raise CompileError(_VALUE_READ)
        return func(*args, **(kwargs or {}))


class _RefuseScalars(TorchDispatchMode):
    """This mode refuses every operation that turns a value into a Python number, including PyTorch's own calls.

    The tracer itself refuses only reads of traced tensors, not of tensors outside the loss.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags and get_proxy_mode() is not None:
            raise CompileError(_VALUE_READ)
        return func(*args, **(kwargs or {}))


def checks_finite_on_host(device: torch.device) -> bool:
    """Return whether to check after each run that all norms are finite; on a GPU the check would wait for queued work.

    Without the check the graph always zeroes dropped samples in the factors, which costs a pass over them.
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
) -> TracedStep:
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
    needs_finite_check = checks_finite_on_host(is_padding.device)

    def step(*flat: Tensor) -> list[Tensor]:
        left = iter(flat[len(given) :])
        rows = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in batch]
        function = loss.loss([next(left) for _ in read])
        with _RefuseScalars():
            *_, mask, norms = flat
            clipping = settings.clipping.with_bounds(norms)
            now = replace(
                settings,
                defers_finite_check=True,
                always_selects=not needs_finite_check,
                clipping=clipping,
            )
            piece = run(function, inputs.names, flat[: len(given)], rows, mask, now, {})
        layout, results = Layout.flatten(piece)
        layouts.append(layout)
        return results

    arguments = [*given, *tensors, *read, is_padding, bounds]
    if lengths.mode is not None:
        arguments = lengths.with_symbols(given, tensors, read, is_padding, bounds)
    with ExitStack() as stack:
        stack.enter_context(_RefuseReads())
        stack.enter_context(_explain_trace_errors())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if lengths.mode is not None:
            stack.enter_context(lengths.mode)
            stack.enter_context(WholeBatch())
        module = make_fx(step, decomposition_table=DECOMPOSITIONS)(*arguments)
    constants = _lift_constants(module)
    writes_outside = any(base.op == "placeholder" for base in written_bases(module.graph))
    has_no_side_effects = not (writes_outside or any(map(may_be_random, module.graph.nodes)))
    merge_equal(module)
    share_grams(module)
    zero_in_place(module)
    sum_apart(module)
    pad_last(module)
    return TracedStep(module, layouts[0], constants, needs_finite_check, has_no_side_effects)


def _lift_constants(module: GraphModule) -> tuple[Tensor, ...]:
    """Turn tensors that the graph holds into inputs, so that it always reads their present values."""
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
def _explain_trace_errors() -> Iterator[None]:
    """Turn an exception into a ``CompileError``; the eager step has run before, so the trace is the cause."""
    try:
        yield
    except (CompileError, NotPerSampleError):
        raise
    except Exception as error:
        if isinstance(error.__cause__, CompileError):
            raise error.__cause__ from None
        message = f"{error} {error.__cause__}"
        if "get value out of a tracing tensor" in message:
            raise CompileError(_VALUE_READ) from error
        raise CompileError(
            f"the step runs, but cannot be traced to a graph ({type(error).__name__}: {error}). Leave compile out for "
            "this loss."
        ) from error
