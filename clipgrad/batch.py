"""This module computes the clipped sums of a batch for ``clipped_grad`` and ``DPOptimizer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from clipgrad import _validate
from clipgrad.arithmetic import Arithmetic, FloatingPoint
from clipgrad.clipping import ClippingStrategy, Relation, copy_strategy, is_grouped
from clipgrad.engine.advice import ValueReadError
from clipgrad.engine.clip_and_sum import MicrobatchResult, PreClipping, Settings, accumulate
from clipgrad.engine.inputs import Inputs, Loss, Restore, copy_samples
from clipgrad.engine.microbatch import choose_strategies, forward, run
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.errors import NotPerSampleError
from clipgrad.exact import GridArithmetic
from clipgrad.explain import Explanation, make_explanation
from clipgrad.options import Options
from clipgrad.ranks import OneProcess, Ranks
from clipgrad.result import Outcome

RunRows = Callable[[slice, Tensor | None], MicrobatchResult]
"""A function from rows of the batch and their padding mask to their clipped sums."""

# PyTorch's capture and compiler take seconds to import, so they are imported where they are first needed.
if TYPE_CHECKING:
    from clipgrad.compiled import Compiler
    from clipgrad.engine.captured_loss import LossGraphs

_DTYPE = attrgetter("dtype")
_T = TypeVar("_T")


@dataclass(frozen=True)
class ClippedBatch:
    """This class holds the clipped sums of a batch.

    Attributes:
        sums: The sum of each parameter, in order.
        aux: Per-sample auxiliary output, or None.
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
    """

    def __init__(self, options: Options, ranks: Ranks | None = None) -> None:
        self.options = options
        self.ranks: Ranks = OneProcess() if ranks is None else ranks
        self.arithmetic: Arithmetic = (
            FloatingPoint(options)
            if options.grid is None
            else GridArithmetic(options.grid, options)
        )
        self._compiler: Compiler | None = None
        self._graphs: LossGraphs | None = None
        self._runs_as_graph = False
        # Settings of the last call, because parameters and norm rarely change between calls.
        self._resolved: tuple[Any, Settings] | None = None
        self._sensitivity: tuple[Any, float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchClipper, (self.options, self.ranks)  # a copy has its own compiled graphs

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
        if size == 0:
            return _empty(inputs, settings, groups)
        rows = self.arithmetic.rows_at_once(size)
        run_rows: RunRows = self._eagerly(inputs, settings)
        if self.options.compile_mode is not None:
            rows, run_rows = self._compiled(inputs, settings)
        results: list[MicrobatchResult] = []
        sums: list[Tensor] | None = None
        aliases = False
        for start in range(0, size, rows):
            part = slice(start, min(start + rows, size))
            result = run_rows(part, None if mask is None else mask[part])
            aliases = result.aliases_graph and may_alias and rows >= size
            sums = result.sums if aliases else accumulate(sums, result)
            # Without this, the sums of all microbatches would stay in memory.
            results.append(replace(result, sums=[]))
            del result
        assert sums is not None
        if self.options.normalize_by != 1.0:
            sums, aliases = [total.div_(self.options.normalize_by) for total in sums], False
        aux = None
        if self.options.has_aux:
            aux = tree_map(lambda *leaves: torch.cat(leaves), *(result.aux for result in results))
        return ClippedBatch(sums, aux, _outcome(results, settings, groups, mask, size), aliases)

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
            tape, _, _ = self._with_loss(
                inputs,
                lambda loss: forward(loss, inputs.names, inputs.params, samples, settings),
            )
        try:
            return make_explanation(
                tape.tracked, choose_strategies(tape, settings), tape.batch_size
            )
        finally:
            tape.release()

    def sensitivity(self, max_grad_norm: ClippingStrategy, relation: Relation) -> float:
        """Return the largest L2 change of the sums between neighbouring batches."""
        key = copy_strategy(max_grad_norm), relation
        if self._sensitivity is None or self._sensitivity[0] != key:
            self._sensitivity = key, self.arithmetic.sensitivity(max_grad_norm, relation)
        return self._sensitivity[1]

    def _eagerly(self, inputs: Inputs, settings: Settings) -> RunRows:
        def run_rows(rows: slice, mask: Tensor | None) -> MicrobatchResult:
            samples = self.arithmetic.samples(inputs.rows(rows))
            return self._with_loss(
                inputs,
                lambda loss: run(loss, inputs.names, inputs.params, samples, mask, settings),
            )

        return run_rows

    def _compiled(self, inputs: Inputs, settings: Settings) -> tuple[int, RunRows]:
        """Return the number of rows of the compiled graph, and the function that runs it."""
        from clipgrad.compiled import Compiler, MicrobatchRunner

        mode = self.options.compile_mode
        assert mode is not None
        compiler = self._compiler = self._compiler or Compiler(mode)
        rows = compiler.rows(self.options.microbatch_size, inputs.batch_size)
        return rows, MicrobatchRunner(compiler, self._loss_graphs(), inputs, settings, rows)

    def _loss_graphs(self) -> LossGraphs:
        from clipgrad.engine.captured_loss import LossGraphs

        if self._graphs is None:
            self._graphs = LossGraphs(
                keep_batch_dim=self.options.keep_batch_dim, has_aux=self.options.has_aux
            )
        return self._graphs

    def _graph_loss(self, inputs: Inputs, refusal: ValueReadError) -> Loss:
        """Return the captured loss, or raise the refusal if PyTorch cannot capture the loss."""
        from clipgrad.loss_graph import CannotCapture

        try:
            return self._loss_graphs().graph_for(inputs).loss()
        except CannotCapture as reason:
            where = f" It does so at {reason.where}." if reason.where else ""
            raise NotPerSampleError(f"{refusal}{where}") from reason

    def _graph_or_none(self, inputs: Inputs) -> Loss | None:
        """Return the captured loss; None if PyTorch cannot capture it now, so that the user's Python must run."""
        from clipgrad.loss_graph import CannotCapture

        with suppress(CannotCapture):
            return self._loss_graphs().graph_for(inputs).loss()
        return None

    def _with_loss(self, inputs: Inputs, body: Callable[[Loss], _T]) -> _T:
        """Run ``body`` on the user's loss; if this reads values of tensors, on the captured graph of the loss."""
        if self._runs_as_graph and (loss := self._graph_or_none(inputs)) is not None:
            return body(loss)
        try:
            return body(inputs.loss)
        except ValueReadError as refusal:
            loss = self._graph_loss(inputs, refusal)
            self._runs_as_graph = True
            return body(loss)

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
                self.ranks,
                sum_rows=self.arithmetic.sum_rows(clipping, sizes),
            )
            self._resolved = key, settings
        transform = self.options.pre_clipping_transform
        if transform is None:
            return self._resolved[1]
        return replace(self._resolved[1], pre_clipping=_on_leaves(transform, restore))


def _on_leaves(transform: Callable[[Any], Any], restore: Restore) -> PreClipping:
    """Return the user's transform of per-sample gradients as a function from leaves to leaves."""

    def apply(gradients: list[Tensor]) -> list[Tensor]:
        before = restore(gradients)
        leaves, structure = tree_flatten(transform(before))
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
        floating = all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        same = structure == tree_flatten(before)[1]
        if not (floating and same and shapes == [tuple(g.shape) for g in gradients]):
            raise ValueError(
                "pre_clipping_transform must return per-sample gradients of the structure and shapes it "
                "received (a floating-point [B, *parameter.shape] for every parameter)."
            )
        return leaves

    return apply


def _empty(inputs: Inputs, settings: Settings, groups: Sequence[str] | None) -> ClippedBatch:
    """Return the zero sums of a batch without samples."""
    sums = [
        torch.zeros_like(p, dtype=dtype)
        for p, dtype in zip(inputs.params, settings.dtypes, strict=True)
    ]
    none = torch.zeros(0, dtype=settings.dtypes[0], device=inputs.params[0].device)
    norms = [none for _ in settings.clipping.groups]
    outcome = Outcome(none, norms, settings.clipping.norms, groups, none.bool(), None, 0)
    return ClippedBatch(sums, None, outcome)


def _outcome(
    results: Sequence[MicrobatchResult],
    settings: Settings,
    groups: Sequence[str] | None,
    mask: Tensor | None,
    size: int,
) -> Outcome:
    return Outcome(
        # ``cat`` copies a single tensor too: the loss may have returned a view of a large tensor.
        torch.cat([result.values for result in results]),
        [_concatenate(norms) for norms in zip(*(result.norms for result in results), strict=True)],
        settings.clipping.norms,
        groups,
        _concatenate([result.nonfinite for result in results]),
        mask,
        size - (0 if mask is None else int(mask.sum())),
    )


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate per-sample values of all microbatches; no other reference to them exists."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
