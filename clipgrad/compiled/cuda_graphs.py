"""Record a compiled step as a CUDA graph, and replay it with one launch instead of one launch per kernel.

PyTorch's own recordings (``triton.cudagraphs``) are switched off for the step. They copy every parameter into their own
memory at each replay, and choose among many recordings at each call. Here parameters keep their memory, and a compiled
step has one recording for each size of a batch.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from clipgrad.compiled.backend import Run
from clipgrad.compiled.recorder import CudaRecorder
from clipgrad.engine.copies import copies
from clipgrad.engine.rng_state import SavedRngState

_log = logging.getLogger("clipgrad")

_ATTENTIONS = (
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


class Common:
    """This class holds what all recordings of a compiled step have in common.

    Args:
        batch: The numbers of the arguments whose rows are those of the batch.

    Attributes:
        rewrites: Whether a replay writes all results; None before the first recording.
    """

    def __init__(self, batch: range = range(0)) -> None:
        self.batch = batch
        self.rewrites: bool | None = None
        self._places: dict[int, Tensor] = {}

    def copy_of(self, number: int, argument: Tensor) -> Tensor:
        """Return a copy of an argument with the same strides, for which the step was compiled.

        Copies of fewer rows lie in the same memory.

        Args:
            number: Of the argument; the next copy for this number may overwrite this one.
            argument: The argument.
        """
        found = self._places.get(number)
        if found is None or not _has_room(found, argument):
            found = self._places[number] = torch.empty_strided(
                argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device
            )
        if argument.dim():
            found = found[: argument.shape[0]]
        return found.copy_(argument.detach())


class _Places(NamedTuple):
    """Where arguments are copied to, if the batch has a certain number of rows.

    The first rows of the batch are copied to the rows that it lacks. Samples of an earlier batch would not do: what a
    loss looks up by their values may have changed.

    Attributes:
        given: The places of the arguments, those of the batch with as many rows as it has.
        added: The other rows of the batch's places.
    """

    given: list[Tensor]
    added: list[Tensor]


def _has_room(place: Tensor, argument: Tensor) -> bool:
    """Return whether the first rows of the place have the layout of the argument."""
    if place.dim() != argument.dim() or place.stride() != argument.stride():
        return False
    if place.dtype != argument.dtype or place.device != argument.device:
        return False
    return place.shape[1:] == argument.shape[1:] and place.shape[:1] >= argument.shape[:1]


class Replay:
    """This class records a compiled step at its first call and replays it at later calls.

    Args:
        run: The compiled step; it has run before, maybe for other sizes.
        resident: For each argument, whether its memory address is the same at each call, as for parameters. If an
            argument's address changes, the argument is copied from then on, as non-resident arguments are.
        common: Of all recordings of the step.
        recorder: A function that makes a recorder.
    """

    def __init__(
        self,
        run: Run,
        resident: Sequence[bool],
        common: Common,
        recorder: Callable[[], CudaRecorder],
    ) -> None:
        self._run, self._common, self._make_recorder = run, common, recorder
        self._resident = list(resident)
        self._recorder: CudaRecorder | None = None
        self._inputs: list[Tensor] = []
        self._places: dict[int, _Places] = {}  # by the number of rows of the batch
        self._results: Sequence[Tensor] = ()
        self._recorded_addresses: list[int] = []
        self._failed = False
        self._separate = False

    def is_recorded_for(self, flat: Sequence[Tensor]) -> bool:
        """Return whether a call with these arguments would not record."""
        return self._failed or (
            self._recorder is not None
            and self._resident_addresses(flat) == self._recorded_addresses
        )

    def adds_rows(self, flat: Sequence[Tensor]) -> bool:
        """Return whether a call replays a recording, which adds the rows that the tensors of the batch lack.

        It adds at most as many as they have.
        """
        if self._recorder is None or not self.is_recorded_for(flat):
            return False
        return all(
            len(self._inputs[number]) <= 2 * len(flat[number]) for number in self._common.batch
        )

    @property
    def returned_uncopied(self) -> bool:
        """Return whether the last call returned the requested results without copying them."""
        return self._separate

    def __call__(self, flat: Sequence[Tensor], uncopied: int = 0) -> list[Tensor]:
        """Return the step's results for these arguments, in fresh memory.

        Args:
            flat: Tensors with the shapes, strides and dtypes of all other calls. If ``adds_rows``, those of the batch
                may have fewer rows.
            uncopied: How many of the first results may be returned without a copy; the next call of any recording in
                the same memory overwrites them.
        """
        self.prepare(flat)
        if self._failed or self._recorder is None:
            return list(self._run(*(tensor.detach() for tensor in flat)))
        self._recorder.wait()
        places = self._places_for(flat)
        batch = [flat[number] for number in self._common.batch] if places.added else []
        added = [leaf[: len(rows)] for leaf, rows in zip(batch, places.added, strict=True)]
        torch._foreach_copy_(
            [*places.given, *places.added], [*self._copied_arguments(flat), *added]
        )
        self._recorder.replay()
        if not self._separate:
            return copies(self._results)
        return [*self._results[:uncopied], *copies(self._results[uncopied:])]

    def prepare(self, flat: Sequence[Tensor]) -> None:
        """Make the recording for these arguments, if there is none."""
        if not self.is_recorded_for(flat):
            self._record(flat)

    def _places_for(self, flat: Sequence[Tensor]) -> _Places:
        """Return where these arguments are copied to."""
        batch = self._common.batch
        rows = flat[batch[0]].shape[0] if batch else 0
        if rows not in self._places:
            inputs, added = list(self._inputs), []
            for number in batch:
                if rows < len(inputs[number]):
                    added.append(inputs[number][rows:])
                inputs[number] = inputs[number][:rows]
            self._places[rows] = _Places(self._copied_arguments(inputs), added)
        return self._places[rows]

    def _copied_arguments(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t for t, stays in zip(tensors, self._resident, strict=True) if not stays]

    def _resident_addresses(self, flat: Sequence[Tensor]) -> list[int]:
        """Return the addresses of resident arguments."""
        return [
            tensor.data_ptr() for tensor, stays in zip(flat, self._resident, strict=True) if stays
        ]

    def _record(self, flat: Sequence[Tensor]) -> None:
        if self._recorder is not None:
            self._resident = [
                stays and tensor.data_ptr() == known.data_ptr()
                for stays, tensor, known in zip(self._resident, flat, self._inputs, strict=True)
            ]
        # This frees memory for the next recording.
        self._recorder, self._results, self._places = None, (), {}
        self._separate = False
        recorder = self._make_recorder()
        recorder.wait()  # arguments and trial run are in memory that a replay on another stream may still read
        with torch.inference_mode(False):
            self._inputs = [
                tensor.detach() if stays else self._common.copy_of(number, tensor)
                for number, (stays, tensor) in enumerate(zip(self._resident, flat, strict=True))
            ]
        generators = SavedRngState(flat[0].device)
        try:
            self._results = recorder.record(lambda: self._run(*self._inputs))
            separate = _are_separate(self._results, self._inputs)
            recorder.wait()  # another recording may still be at work in the same memory
            if separate and self._common.rewrites is None:
                self._common.rewrites = _are_rewritten(self._results, recorder)
            else:
                recorder.replay()  # CUDA prepares a graph at its first launch, which takes a third of a short step
            self._separate = separate and bool(self._common.rewrites)
        except Exception as error:  # kernels that cannot be recorded raise errors of many types
            self._failed, self._inputs = True, []
            _log.warning(
                "clipgrad: the compiled step runs without CUDA graphs, since it cannot be recorded (%s: %s).",
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )
            return
        finally:
            generators.restore()  # the trial runs advance the RNG, and the real run must start from the same state
        self._recorder, self._recorded_addresses = recorder, self._resident_addresses(flat)


def _are_separate(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Return whether no result shares memory with another tensor, so that callers may write to it."""
    results = [result for result in results if result.numel()]
    places = [tensor.untyped_storage().data_ptr() for tensor in (*results, *inputs)]
    return len(set(places[: len(results)]) - set(places[len(results) :])) == len(results)


def _are_rewritten(results: Sequence[Tensor], recorder: CudaRecorder) -> bool:
    """Return whether a replay writes all results; a caller's write to a constant result would otherwise persist."""
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
    """Return whether a recording would include the whole graph; a replay does not repeat work of the CPU."""
    return all(
        value.device == device
        for node in module.graph.nodes
        if not _is_seed(node)
        for value in tree_leaves(node.meta.get("val"))
        if isinstance(value, Tensor)
    )


def _is_seed(node: Node) -> bool:
    """Return whether a node is a fused attention or one of its results, such as seed and offset of its dropout.

    Seed and offset are on the CPU, except during a recording: then they are on the device, with new values per replay.
    """
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and source.target in _ATTENTIONS
