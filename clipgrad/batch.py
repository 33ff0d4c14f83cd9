"""This module computes the clipped sums of a batch for ``clipped_grad`` and ``DPOptimizer``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad import _validate, empty_batch
from clipgrad.arithmetic import Arithmetic, FloatingPoint
from clipgrad.clipping import ClippingStrategy, Relation, copy_strategy, is_grouped
from clipgrad.engine.batch_loss import LossHistory
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings, accumulate
from clipgrad.engine.flat_tree import Restore
from clipgrad.engine.inputs import Inputs, copy_samples
from clipgrad.engine.microbatch import choose_strategies, forward, run
from clipgrad.engine.microbatch_size import FixedRows, growing_rows, run_or_shrink
from clipgrad.engine.pre_clipping import on_leaves
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.exact import GridArithmetic
from clipgrad.explain import Explanation, make_explanation
from clipgrad.options import Options
from clipgrad.ranks import OneProcess, Ranks
from clipgrad.result import Outcome, outcome_of

RunRows = Callable[[slice, Tensor | None], MicrobatchResult]
"""A function from rows of the batch and their padding mask to their clipped sums."""

# PyTorch's capture and compiler take seconds to import, so they are imported where they are first needed.
if TYPE_CHECKING:
    from clipgrad.compiled import Compiler

_DTYPE = attrgetter("dtype")


@dataclass(frozen=True)
class ClippedBatch:
    """This class holds the clipped sums of a batch.

    Attributes:
        sums: The sum of each parameter, in order.
        aux: Per-sample auxiliary output; None or ``()`` if there is none.
        outcome: Norm, loss and flags of each sample.
        aliases_graph: Whether ``sums`` alias the memory of a CUDA graph, which the next batch overwrites.
    """

    sums: list[Tensor]
    aux: Any
    outcome: Outcome
    aliases_graph: bool = False


class BatchClipper:
    """This class computes clipped sums of batches, and caches compiled graphs and settings from batch to batch.

    Args:
        options: The user's options.
        ranks: The processes that train together.
        room: How many samples run at once on a compiled graph if ``microbatch_size`` is not set; None takes the number
            of the first batch.
    """

    def __init__(
        self, options: Options, ranks: Ranks | None = None, room: int | None = None
    ) -> None:
        self.options, self.room = options, room
        self.ranks: Ranks = OneProcess() if ranks is None else ranks
        self.arithmetic: Arithmetic = (
            FloatingPoint(options)
            if options.grid is None
            else GridArithmetic(options.grid, options)
        )
        self._compiler: Compiler | None = None
        self._loss_history = LossHistory(
            keep_batch_dim=options.keep_batch_dim, has_aux=options.has_aux
        )
        # Settings of the last call, because parameters and norm rarely change between calls.
        self._resolved: tuple[Any, Settings] | None = None
        self._sensitivity: tuple[Any, float] | None = None
        self._aux_of_none: Any = None
        self._growing: FixedRows | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchClipper, (
            self.options,
            self.ranks,
            self.room,
        )  # a copy has its own compiled graphs

    def use_graph_of_loss(self) -> None:
        """Run each batch on PyTorch's graph of the loss, never on its Python, because that is compiled code."""
        self._loss_history.needs_graph = True

    def clip(
        self,
        inputs: Inputs,
        max_grad_norm: ClippingStrategy,
        is_padding: Tensor | None,
        *,
        restore: Restore = list,
        may_alias: bool = False,
    ) -> ClippedBatch:
        """Return the clipped sums of a batch.

        Args:
            inputs: The batch and the parameters.
            max_grad_norm: A strategy in which every norm is a number.
            is_padding: Boolean ``[B]``; samples marked True contribute exactly nothing.
            restore: A function from leaves to the structure that ``pre_clipping_transform`` receives.
            may_alias: Whether sums may alias a CUDA graph's memory, which saves a copy.

        Raises:
            ValueError: If the arguments do not fit together.
            NotPerSampleError: If the loss has no gradient for single samples.
            CompileError: If the step cannot be compiled.
        """
        size = inputs.batch_size
        mask = _validate.padding_mask(is_padding, size)
        settings = self._settings(inputs, max_grad_norm, restore)
        groups = settings.clipping.groups if is_grouped(max_grad_norm) else None
        rows = self.arithmetic.rows_at_once(max(size, 1))
        own = len(range(0, size, rows))
        idle = self.ranks.passes(own) - own
        if size == 0:
            outcome = empty_batch.outcome_of_no_samples(inputs, settings, groups)
            return ClippedBatch(*self._nothing(inputs, settings, idle), outcome)
        sizes, run_rows = self._rows_at_once(inputs, settings)
        results: list[MicrobatchResult] = []
        total: list[Tensor] | None = None
        aliases, start = False, 0
        while start < size:
            part = slice(start, min(start + sizes.rows, size))
            padding = None if mask is None else mask[part]
            result = run_or_shrink(partial(run_rows, part, padding), part.stop - start, sizes)
            if result is None:
                continue
            start = part.stop
            aliases = result.aliases_graph and may_alias and part == slice(0, size)
            total = result.sums if aliases else accumulate(total, result)
            # Without this, the sums of all microbatches would stay in memory.
            results.append(replace(result, sums=[]))
            del result
        sizes.report()
        sums, _ = self._idle(idle, inputs, settings, total)
        sums = self.ranks.after_batch(sums, inputs.params)
        if self.options.normalize_by != 1.0:
            sums, aliases = [s.div_(self.options.normalize_by) for s in sums], False
        aux = None
        if self.options.has_aux is not False:
            aux = tree_map(lambda *leaves: torch.cat(leaves), *(result.aux for result in results))
            if self._aux_of_none is None:
                self._aux_of_none = empty_batch.without_samples(aux)
        outcome = outcome_of(
            [result.values for result in results],
            [result.norms for result in results],
            [result.nonfinite for result in results],
            settings.clipping.norms,
            groups,
            mask,
        )
        return ClippedBatch(sums, aux, outcome, aliases)

    def _nothing(self, inputs: Inputs, settings: Settings, idle: int) -> tuple[list[Tensor], Any]:
        """Return the sums and the auxiliary output of no samples, while other processes may have samples."""
        if idle:
            return self._idle(idle, inputs, settings, None)
        aux = self._aux_of_nothing(inputs, settings)
        sums = settings.ranks.summed(empty_batch.zero_sums(inputs, settings), inputs.params)
        return self.ranks.after_batch(sums, inputs.params), aux

    def _idle(
        self, passes: int, inputs: Inputs, settings: Settings, sums: list[Tensor] | None
    ) -> tuple[list[Tensor], Any]:
        """Run a row of padding, which contributes nothing, ``passes`` times; return sums and aux of no samples."""
        aux: Any = ()
        if passes:
            run_rows = self._eagerly(empty_batch.one_row_of_zeros(inputs), settings)
            for _ in range(passes):
                result = run_rows(slice(0, 1), empty_batch.one_row_of_padding(inputs))
                sums = accumulate(sums, result)
                aux = empty_batch.without_samples(result.aux)
        assert sums is not None
        return sums, aux

    def explain(
        self, inputs: Inputs, max_grad_norm: ClippingStrategy, *, restore: Restore = list
    ) -> Explanation:
        """Run the forward pass of one microbatch and return how each parameter's norm would be computed.

        It runs on a copy of the batch, and PyTorch's RNG state is restored afterwards.

        Raises:
            ValueError: If the batch holds no sample.
        """
        size = inputs.batch_size
        if size == 0:
            raise ValueError(
                "explain needs a batch of at least one sample; the estimates depend on it."
            )
        settings = self._settings(inputs, max_grad_norm, restore)
        rows = slice(0, min(self.arithmetic.rows_at_once(size), size))
        samples = copy_samples(inputs.rows(rows))
        with torch.enable_grad(), SavedRngState(inputs.params[0].device).restored_on_exit():
            tape, _, _ = self._loss_history.of(inputs).run(
                lambda loss: forward(
                    loss, inputs.names, inputs.params, samples, settings, inputs.whole
                )
            )
        try:
            choices = choose_strategies(tape, settings)
            costs = self.ranks.costs(inputs.params, settings.dtypes)
            return make_explanation(tape.tracked, choices, tape.batch_size, self.ranks.size, costs)
        finally:
            tape.release()

    def _aux_of_nothing(self, inputs: Inputs, settings: Settings) -> Any:
        """Return the auxiliary output of no samples: that of an earlier batch, else that of a row of zeros."""
        if self.options.has_aux is False:
            return None
        if self._aux_of_none is None:
            # A sharded model's forward pass needs all processes, of which some may know the auxiliary output already.
            if not settings.ranks.is_sharded:
                self._aux_of_none = empty_batch.aux_of_no_samples(
                    self._loss_history, inputs, settings
                )
            if self._aux_of_none is None:
                return ()
        return tree_map(torch.clone, self._aux_of_none)

    def sensitivity(self, max_grad_norm: ClippingStrategy, relation: Relation) -> float:
        """Return the largest L2 change of the sums between neighbouring batches."""
        key = copy_strategy(max_grad_norm), relation
        if self._sensitivity is None or self._sensitivity[0] != key:
            self._sensitivity = key, self.arithmetic.sensitivity(max_grad_norm, relation)
        return self._sensitivity[1]

    def _rows_at_once(self, inputs: Inputs, settings: Settings) -> tuple[FixedRows, RunRows]:
        """Return the number of samples that run together, and the function that runs them."""
        if self.options.compile_mode is not None:
            rows, run_rows = self._compiled(inputs, settings)
            return FixedRows(rows), run_rows
        if self.options.microbatch_size == "auto" and self.options.grid is None:
            self._growing = self._growing or growing_rows(inputs.params[0].device)
            return self._growing, self._eagerly(inputs, settings)
        rows = self.arithmetic.rows_at_once(inputs.batch_size)
        return FixedRows(rows), self._eagerly(inputs, settings)

    def _eagerly(self, inputs: Inputs, settings: Settings) -> RunRows:
        batch_loss = self._loss_history.of(inputs)

        def run_rows(rows: slice, mask: Tensor | None) -> MicrobatchResult:
            samples = self.arithmetic.samples(inputs.rows(rows))
            return batch_loss.run(
                lambda loss: run(
                    loss, inputs.names, inputs.params, samples, mask, settings, inputs.whole
                )
            )

        return run_rows

    def _compiled(self, inputs: Inputs, settings: Settings) -> tuple[int, RunRows]:
        """Return how many samples run together, and the function that runs them on a compiled graph."""
        from clipgrad.compiled import Compiler, MicrobatchRunner

        mode = self.options.compile_mode
        assert mode is not None
        compiler = self._compiler = self._compiler or Compiler(mode)
        size = self.options.microbatch_size
        assert not isinstance(size, str)
        rows = compiler.rows(size, self.room, inputs.batch_size, inputs.params[0].device)
        runner = MicrobatchRunner(compiler, self._loss_history.graphs, inputs, settings, rows)
        return rows.at_once(inputs.batch_size), runner

    def _settings(
        self, inputs: Inputs, max_grad_norm: ClippingStrategy, restore: Restore
    ) -> Settings:
        """Resolve the options for the present parameters; cached, because these rarely change."""
        self.arithmetic.check_batch_size(inputs.batch_size)
        sizes = tuple(map(Tensor.numel, inputs.params))
        dtypes = tuple(map(_DTYPE, inputs.params))
        key = copy_strategy(max_grad_norm), inputs.names, sizes, dtypes
        if self._resolved is None or self._resolved[0] != key:
            clipping = self.arithmetic.clipping(max_grad_norm, inputs.names, sizes, dtypes)
            settings = Settings(
                self.options,
                clipping,
                tuple(map(self.arithmetic.sum_dtype, dtypes)),
                self.ranks.within_batch,
                sum_rows=self.arithmetic.sum_rows(clipping, sizes),
            )
            self._resolved = key, settings
        transform = self.options.pre_clipping_transform
        if transform is None:
            return self._resolved[1]
        return replace(self._resolved[1], pre_clipping=on_leaves(transform, restore))
