"""Run the eager step where a compiled one cannot serve, and where it has to be compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

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

_Run = Callable[[Settings, int], MicrobatchResult | None]
"""Runs with these settings on so many rows at a time."""
_log = logging.getLogger("clipgrad")


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
        run = partial(self._eagerly, self._inputs.params, batch, mask)
        found = self._whole_or_pieces(run, batch, self._settings)
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
        rows = self._inputs.params, batch, mask
        found: MicrobatchResult | None = None
        with generators.temporarily_restored(), suppress(NeedsGraphError):
            found = self._compared(partial(self._of_python, *rows), batch)
        if found is None:
            with generators.temporarily_restored():
                found = self._compared(partial(self._by_sample, batch, mask), batch)
        if found is None:
            with generators.temporarily_restored():
                found = self._compared(partial(self._of_graph, *rows), batch)
        assert found is not None
        return found

    def nearby(
        self, batch: Sequence[Any], mask: Tensor | None, generators: SavedRngState, step: float
    ) -> Iterator[MicrobatchResult]:
        """Yield the eager step's result, and then its results with parameters that are off by some roundings."""
        params = self._inputs.params
        for near in chain([params], moved_by_rounding(params, step)):
            with generators.temporarily_restored():
                found = self._compared(partial(self._eagerly, near, batch, mask), batch)
            assert found is not None
            yield found

    def _compared(self, run: _Run, batch: Sequence[Any]) -> MicrobatchResult | None:
        """Return a result whose sums are on the host, if memory runs out with all rows."""
        ranks = SumsOnHost()
        scarce = replace(self._settings, ranks=ranks)
        found = self._whole_or_pieces(run, batch, scarce)
        return found if found is None else replace(found, sums=ranks.totals or found.sums)

    def _whole_or_pieces(
        self, run: _Run, batch: Sequence[Any], scarce: Settings
    ) -> MicrobatchResult | None:
        """Run with all rows at once; if memory runs out, in pieces with the settings ``scarce``."""
        size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
        sizes = _WholeOrPieces(size, may_split=self._may_split)
        found = run_or_shrink(lambda: (run(self._settings, size),), size, sizes)
        if found is not None:
            return found[0]
        _log.info(
            "clipgrad: memory ran out in an eager step, which runs on fewer samples at a time."
        )
        return run(scarce, sizes.rows)

    def _eagerly(
        self,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
        rows: int,
    ) -> MicrobatchResult:
        """Run the user's Python, or the captured loss where the Python cannot be batched."""
        try:
            return self._of_python(params, batch, mask, settings, rows)
        except NeedsGraphError:
            if self._loss is None:
                raise
            return self._of_graph(params, batch, mask, settings, rows)

    def _of_python(
        self,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
        rows: int,
    ) -> MicrobatchResult:
        return self._in_pieces(self._inputs.loss, params, batch, mask, settings, rows)

    def _of_graph(
        self,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
        rows: int,
    ) -> MicrobatchResult:
        assert self._loss is not None
        return self._in_pieces(self._loss.loss(), params, batch, mask, settings, rows)

    def _in_pieces(
        self,
        loss: Loss,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
        rows: int,
    ) -> MicrobatchResult:
        inputs = self._inputs

        def piece(part: slice) -> MicrobatchResult:
            own = [leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in batch]
            padding = None if mask is None else mask[part]
            return run(loss, inputs.names, params, own, padding, settings, inputs.whole)

        size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
        if rows >= size:
            return piece(slice(size))
        return joined(piece(slice(start, start + rows)) for start in range(0, size, rows))

    def _by_sample(
        self, batch: Sequence[Any], mask: Tensor | None, settings: Settings, rows: int
    ) -> MicrobatchResult | None:
        return run_sample_loop(self._inputs, batch, mask, settings)
