"""Run the eager step where a compiled one cannot serve, and where it has to be compared."""

from __future__ import annotations

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
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.engine.sample_loop import run_sample_loop
from clipgrad.engine.sums_on_host import SumsOnHost

# The eager step needs more memory than the compiled one. Where memory is scarce, it runs in so many pieces.
_PIECES = {"cuda": 16}


class EagerStep:
    """This class runs the eager step of a microbatch.

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
        self._pieces = _PIECES.get(inputs.params[0].device.type, 1) if may_split else 1

    def __call__(self, batch: Sequence[Any], mask: Tensor | None) -> MicrobatchResult:
        """Return the result for rows of a batch, of which ``mask`` marks padding."""
        return self._eagerly(self._inputs.params, batch, mask, self._settings)

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
            found = self._compared(partial(self._of_python, *rows))
        if found is None:
            with generators.temporarily_restored():
                found = self._compared(partial(run_sample_loop, self._inputs, batch, mask))
        if found is None:
            with generators.temporarily_restored():
                found = self._compared(partial(self._of_graph, *rows))
        assert found is not None
        return found

    def nearby(
        self, batch: Sequence[Any], mask: Tensor | None, generators: SavedRngState, step: float
    ) -> Iterator[MicrobatchResult]:
        """Yield the eager step's result, and then its results with parameters that are off by some roundings."""
        params = self._inputs.params
        for near in chain([params], moved_by_rounding(params, step)):
            with generators.temporarily_restored():
                found = self._compared(partial(self._eagerly, near, batch, mask))
            assert found is not None
            yield found

    def _compared(
        self, function: Callable[[Settings], MicrobatchResult | None]
    ) -> MicrobatchResult | None:
        """Return a result whose sums are on the host, if rows run in pieces."""
        if self._pieces == 1:
            return function(self._settings)
        ranks = SumsOnHost()
        found = function(replace(self._settings, ranks=ranks))
        return found if found is None else replace(found, sums=ranks.totals or found.sums)

    def _eagerly(
        self,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
    ) -> MicrobatchResult:
        """Run the user's Python, or the captured loss where the Python cannot be batched."""
        try:
            return self._of_python(params, batch, mask, settings)
        except NeedsGraphError:
            if self._loss is None:
                raise
            return self._of_graph(params, batch, mask, settings)

    def _of_python(
        self,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
    ) -> MicrobatchResult:
        return self._in_pieces(self._inputs.loss, params, batch, mask, settings)

    def _of_graph(
        self,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
    ) -> MicrobatchResult:
        assert self._loss is not None
        return self._in_pieces(self._loss.loss(), params, batch, mask, settings)

    def _in_pieces(
        self,
        loss: Loss,
        params: Sequence[Tensor],
        batch: Sequence[Any],
        mask: Tensor | None,
        settings: Settings,
    ) -> MicrobatchResult:
        inputs = self._inputs

        def piece(rows: slice) -> MicrobatchResult:
            own = [leaf[rows] if isinstance(leaf, Tensor) else leaf for leaf in batch]
            padding = None if mask is None else mask[rows]
            return run(loss, inputs.names, params, own, padding, settings, inputs.whole)

        size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
        step = -(-size // self._pieces)
        if step == size:
            return piece(slice(size))
        return joined(piece(slice(start, start + step)) for start in range(0, size, step))
