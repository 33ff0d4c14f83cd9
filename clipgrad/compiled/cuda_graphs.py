"""Record a compiled step as a CUDA graph, and replay it: one launch instead of one for each kernel.

PyTorch's own recordings (``triton.cudagraphs``) are turned off for it. They copy every parameter into memory of their
own at each replay, and decide at each call which of many recordings is meant. Here parameters stay where they are, and
there is one recording for each compiled step.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from clipgrad.compiled.backend import Run
from clipgrad.compiled.signature import describe_all
from clipgrad.engine.copies import copies
from clipgrad.engine.rng_state import Generators

_log = logging.getLogger("clipgrad")
_PLAIN = {Tensor, nn.Parameter}

_ATTENTIONS = (
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


class Recorder(Protocol):
    """Takes down what a device does while a function runs."""

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Run the function and note its work; what it returned lies in memory that every replay overwrites."""
        ...

    def wait(self) -> None:
        """Let nothing that follows overtake the last replay."""
        ...

    def replay(self) -> None:
        """Do the noted work again, on the same memory."""
        ...


class CudaRecorder:
    """A CUDA graph, with memory of its own.

    Args:
        device: Where everything lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._last: torch.cuda.Stream | None = None

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        with torch.cuda.device(self._device):
            stream, now = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                function()  # libraries make their handles and workspaces for a stream at its first use
            now.wait_stream(stream)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                results = function()
        return results

    def wait(self) -> None:
        now = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != now:
            now.wait_stream(self._last)  # which may still read or write the same memory
        self._last = now

    def replay(self) -> None:
        self._graph.replay()


class Replay:
    """A compiled step that is recorded at its first call and replayed at all others.

    Args:
        run: The compiled step; it has run before.
        resident: For each argument whether it stays where it is from call to call, as parameters do. One that is found
            somewhere else is copied from then on, like all others.
        recorder: Makes a recorder.
    """

    def __init__(
        self, run: Run, resident: Sequence[bool], recorder: Callable[[], Recorder]
    ) -> None:
        self._run, self._make = run, recorder
        self._resident = list(resident)
        self._recorder: Recorder | None = None
        self._inputs: list[Tensor] = []
        self._moved: list[Tensor] = []  # those of them that each call copies to
        self._results: Sequence[Tensor] = ()
        self._places: list[int] = []
        self._failed = False
        self._separate = False

    def settled(self, flat: Sequence[Tensor]) -> bool:
        """Whether a call with these arguments would record nothing."""
        return self._failed or (self._recorder is not None and self._at(flat) == self._places)

    def fits(self, flat: Sequence[Tensor]) -> bool:
        """Whether the recording can be replayed with these arguments, whatever else they mean.

        What stays is alive as long as the recording, so that reading it is safe even if nobody else holds it any more.
        """
        return (
            self._recorder is not None
            and len(flat) == len(self._resident)
            and _PLAIN.issuperset(map(type, flat))  # others may have no address
            and self._at(flat) == self._places
            and describe_all(self._moving(flat)) == describe_all(self._moved)
        )

    @property
    def lends(self) -> bool:
        """Whether the last call lent what it was asked to lend."""
        return self._separate

    def __call__(self, flat: Sequence[Tensor], lend: int = 0) -> list[Tensor]:
        """What the step returns for these arguments, in fresh memory.

        Args:
            flat: Tensors of the shapes, strides and dtypes of every other call.
            lend: How many of the first results may stay where they are instead, until the next call overwrites them.
        """
        if not self.settled(flat):
            self._record(flat)
        if self._failed or self._recorder is None:
            return list(self._run(*(tensor.detach() for tensor in flat)))
        self.start(flat)
        return self.results(lend)

    def start(self, flat: Sequence[Tensor]) -> None:
        """Replay for these arguments, which fit."""
        assert self._recorder is not None
        self._recorder.wait()
        torch._foreach_copy_(self._moved, self._moving(flat))
        self._recorder.replay()

    def results(self, lend: int) -> list[Tensor]:
        """What was replayed last, as a call returns it.

        Args:
            lend: As for a call.
        """
        if not self._separate:
            return copies(self._results)
        return [*self._results[:lend], *copies(self._results[lend:])]

    def _moving(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t for t, stays in zip(tensors, self._resident, strict=True) if not stays]

    def _at(self, flat: Sequence[Tensor]) -> list[int]:
        """Addresses of what is taken to stay."""
        return [
            tensor.data_ptr() for tensor, stays in zip(flat, self._resident, strict=True) if stays
        ]

    def _record(self, flat: Sequence[Tensor]) -> None:
        if self._recorder is not None:
            self._resident = [
                stays and tensor.data_ptr() == known.data_ptr()
                for stays, tensor, known in zip(self._resident, flat, self._inputs, strict=True)
            ]
        self._recorder, self._results = None, ()  # its memory serves the next one
        self._separate = False
        with torch.inference_mode(False):
            self._inputs = [
                tensor.detach() if stays else _same_layout(tensor)
                for stays, tensor in zip(self._resident, flat, strict=True)
            ]
        recorder = self._make()
        generators = Generators(flat[0].device)
        try:
            self._results = recorder.record(lambda: self._run(*self._inputs))
            separate = _are_separate(self._results, self._inputs)
            self._separate = separate and _are_rewritten(self._results, recorder)
        except Exception as error:  # whatever a kernel may do that cannot be recorded
            self._failed, self._inputs = True, []
            _log.warning(
                "clipgrad: the compiled step runs without CUDA graphs, since it cannot be recorded (%s: %s).",
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )
            return
        finally:
            generators.restore()  # a trial run draws random numbers, and none may be missing from the real one
        self._recorder, self._places = recorder, self._at(flat)
        self._moved = self._moving(self._inputs)


def _are_separate(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether each result has memory of its own, so that somebody may write to it until it is overwritten."""
    results = [result for result in results if result.numel()]
    places = [tensor.untyped_storage().data_ptr() for tensor in (*results, *inputs)]
    return len(set(places[: len(results)]) - set(places[len(results) :])) == len(results)


def _are_rewritten(results: Sequence[Tensor], recorder: Recorder) -> bool:
    """Whether a replay writes all results, also those that are constant: what somebody wrote to would stay."""
    floating = [result for result in results if result.is_floating_point() and result.numel()]
    before = copies(floating)
    for result in floating:
        result.fill_(math.nan)
    recorder.replay()
    same = [bool(result.isnan().all()) for result in floating]
    for result, then, stayed in zip(floating, before, same, strict=True):
        if stayed:
            result.copy_(then)
    return not any(same)


def recordable(module: GraphModule, device: torch.device) -> bool:
    """Whether a recording would hold all of a graph: what the CPU does is done once, and never repeated."""
    return device.type == "cuda" and all(
        value.device == device
        for node in module.graph.nodes
        if not _is_seed(node)
        for value in tree_leaves(node.meta.get("val"))
        if isinstance(value, Tensor)
    )


def _is_seed(node: Node) -> bool:
    """Whether a node is a fused attention or a part of its result, among them the seed and the offset of its dropout.

    They lie on the CPU, unless a recording is made: then on the device, where each replay finds new ones.
    """
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and source.target in _ATTENTIONS


def _same_layout(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which the compiled step was made for."""
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return made.copy_(tensor.detach())
