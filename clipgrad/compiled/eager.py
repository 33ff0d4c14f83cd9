"""Run the eager step where a compiled one cannot serve, and where it has to be compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipgrad.compiled.check import moved_by_rounding
from clipgrad.engine.captured_loss import GraphOfLoss
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings, joined
from clipgrad.engine.error_messages import NeedsGraphError
from clipgrad.engine.inputs import Inputs, Loss
from clipgrad.engine.microbatch import run
from clipgrad.engine.microbatch_size import FixedRows, run_or_shrink
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.engine.sample_loop import run_sample_loop
from clipgrad.engine.sums_on_host import SumsOnHost

_PIECES = 16  # of the rows, where memory runs out with all of them

_log = logging.getLogger("clipgrad")


class _Rows(NamedTuple):
    """This class holds rows of a batch, which of them are padding, and the parameters at which they run."""

    params: Sequence[Tensor]
    batch: Sequence[Any]
    mask: Tensor | None

    @property
    def size(self) -> int:
        return int(next(leaf.shape[0] for leaf in self.batch if isinstance(leaf, Tensor)))

    def part(self, of: slice) -> _Rows:
        batch = [leaf[of] if isinstance(leaf, Tensor) else leaf for leaf in self.batch]
        return _Rows(self.params, batch, None if self.mask is None else self.mask[of])


_Run = Callable[[_Rows, Settings, int], MicrobatchResult | None]
"""Runs rows with these settings, so many of them at a time."""


class _WholeOrPieces(FixedRows):
    """All rows at once, or pieces of them after memory ran out."""

    def __init__(self, rows: int, *, may_split: bool) -> None:
        super().__init__(rows)
        self._may_split = may_split

    def ran_out(self, rows: int) -> bool:
        self.rows = -(-rows // _PIECES)
        return self._may_split and rows > 1


class EagerStep:
    """This class runs the eager step of a microbatch.

    It needs more memory than the compiled one. If memory runs out, it runs on a few rows at a time.

    Args:
        inputs: The arguments of the call.
        settings: The resolved options.
        loss: The captured loss, or None if there is none.
        may_split: Whether rows may run in pieces, which draws other random numbers than all rows at once.
    """

    def __init__(
        self, inputs: Inputs, settings: Settings, loss: GraphOfLoss | None, *, may_split: bool
    ) -> None:
        self._inputs, self._settings, self._loss = inputs, settings, loss
        self._may_split = may_split

    def __call__(self, batch: Sequence[Any], mask: Tensor | None) -> MicrobatchResult:
        """Return the result for rows of a batch, of which ``mask`` marks padding."""
        rows = _Rows(self._inputs.params, batch, mask)
        found = self._whole_or_pieces(self._eagerly, rows, self._settings)
        assert found is not None
        return found

    def expected(
        self, batch: Sequence[Any], mask: Tensor | None, generators: SavedRngState
    ) -> MicrobatchResult:
        """Return what the compiled step has to compute, by the user's Python as long as that is possible.

        Args:
            batch: Rows of one microbatch.
            mask: Which of them are padding.
            generators: The RNG state at which the step started; every attempt starts there.
        """
        rows = _Rows(self._inputs.params, batch, mask)
        found: MicrobatchResult | None = None
        with generators.temporarily_restored(), suppress(NeedsGraphError):
            found = self._compared(self._of_python, rows)
        if found is None:
            with generators.temporarily_restored():
                found = self._compared(self._by_sample, rows)
        if found is None:
            with generators.temporarily_restored():
                found = self._compared(self._of_graph, rows)
        assert found is not None
        return found

    def nearby(
        self, batch: Sequence[Any], mask: Tensor | None, generators: SavedRngState, step: float
    ) -> Iterator[MicrobatchResult]:
        """Yield the eager step's result, and then its results with parameters that are off by some roundings."""
        params = self._inputs.params
        for near in chain([params], moved_by_rounding(params, step)):
            with generators.temporarily_restored():
                found = self._compared(self._eagerly, _Rows(near, batch, mask))
            assert found is not None
            yield found

    def _compared(self, run: _Run, rows: _Rows) -> MicrobatchResult | None:
        """Return a result whose sums are on the host, if memory runs out with all rows."""
        ranks = SumsOnHost()
        # PyTorch keeps cuDNN's plans for each thread, and this one has those of the compiled step for these sizes.
        with torch.autograd.set_multithreading_enabled(False):
            found = self._whole_or_pieces(run, rows, replace(self._settings, ranks=ranks))
        return found if found is None else replace(found, sums=ranks.totals or found.sums)

    def _whole_or_pieces(self, run: _Run, rows: _Rows, scarce: Settings) -> MicrobatchResult | None:
        """Run with all rows at once; if memory runs out, in pieces with the settings ``scarce``."""
        size = rows.size
        sizes = _WholeOrPieces(size, may_split=self._may_split)
        found = run_or_shrink(lambda: (run(rows, self._settings, size),), size, sizes)
        if found is not None:
            return found[0]
        _log.info(
            "clipgrad: memory ran out in an eager step, which runs on fewer samples at a time."
        )
        return run(rows, scarce, sizes.rows)

    def _eagerly(self, rows: _Rows, settings: Settings, at_once: int) -> MicrobatchResult:
        """Run the user's Python, or the captured loss where the Python cannot be batched."""
        try:
            return self._of_python(rows, settings, at_once)
        except NeedsGraphError:
            if self._loss is None:
                raise
            return self._of_graph(rows, settings, at_once)

    def _of_python(self, rows: _Rows, settings: Settings, at_once: int) -> MicrobatchResult:
        return self._in_pieces(self._inputs.loss, rows, settings, at_once)

    def _of_graph(self, rows: _Rows, settings: Settings, at_once: int) -> MicrobatchResult:
        assert self._loss is not None
        return self._in_pieces(self._loss.loss(), rows, settings, at_once)

    def _by_sample(self, rows: _Rows, settings: Settings, at_once: int) -> MicrobatchResult | None:
        return run_sample_loop(self._inputs, rows.batch, rows.mask, settings)

    def _in_pieces(
        self, loss: Loss, rows: _Rows, settings: Settings, at_once: int
    ) -> MicrobatchResult:
        inputs = self._inputs

        def piece(own: _Rows) -> MicrobatchResult:
            return run(loss, inputs.names, *own, settings, inputs.whole)

        size = rows.size
        if at_once >= size:
            return piece(rows)
        starts = range(0, size, at_once)
        return joined(piece(rows.part(slice(start, start + at_once))) for start in starts)
