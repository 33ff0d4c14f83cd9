"""From a batch of leaves to clipped sums: the core that ``clipped_grad`` and ``DPOptimizer`` share."""

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
from clipgrad.clipping import ClippingStrategy, Relation, is_grouped, owned
from clipgrad.engine.advice import ValueReadError
from clipgrad.engine.clip_and_sum import MicrobatchResult, PreClipping, Settings, accumulate
from clipgrad.engine.inputs import Inputs, Loss, Restore, copied
from clipgrad.engine.microbatch import forward, plan, run
from clipgrad.engine.rng_state import Generators
from clipgrad.errors import NotPerSampleError
from clipgrad.exact import OnGrid
from clipgrad.explain import Explanation, make_explanation
from clipgrad.options import Options
from clipgrad.ranks import OneProcess, Ranks
from clipgrad.result import Outcome

RunRows = Callable[[slice, Tensor | None], MicrobatchResult]
"""From rows of the batch, and which of them are padding, to their clipped sums."""

# PyTorch's capture and compiler take seconds to import, so they are imported where they are first needed.
if TYPE_CHECKING:
    from clipgrad.compiled import Compiler
    from clipgrad.engine.captured_loss import LossGraphs

_DTYPE = attrgetter("dtype")
_T = TypeVar("_T")


@dataclass(frozen=True)
class ClippedBatch:
    """The clipped sums of a batch.

    Attributes:
        sums: Of each parameter, in its order.
        aux: Per-sample auxiliary output, or None.
        outcome: What became of each sample.
        aliases_graph: Whether ``sums`` alias the memory of a CUDA graph, which the next batch overwrites.
    """

    sums: list[Tensor]
    aux: Any
    outcome: Outcome
    aliases_graph: bool = False


class BatchClipper:
    """Computes the clipped sums of batches; keeps what was compiled and resolved for the next one.

    Args:
        options: Of the user.
        ranks: The processes that train together.
    """

    def __init__(self, options: Options, ranks: Ranks | None = None) -> None:
        self.options = options
        self.ranks: Ranks = OneProcess() if ranks is None else ranks
        self.arithmetic: Arithmetic = (
            FloatingPoint(options) if options.grid is None else OnGrid(options.grid, options)
        )
        self._compiler: Compiler | None = None
        self._graphs: LossGraphs | None = None
        self._runs_as_graph = False
        # Of the last call: parameters and norm rarely change from one to the next.
        self._resolved: tuple[Any, Settings] | None = None
        self._sensitivity: tuple[Any, float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchClipper, (self.options, self.ranks)  # a copy compiles for itself

    def clip(
        self,
        inputs: Inputs,
        max_grad_norm: ClippingStrategy,
        is_padding: Tensor | None,
        *,
        restore: Restore = list,
        may_alias: bool = False,
    ) -> ClippedBatch:
        """The clipped sums of a batch.

        Args:
            inputs: The batch and the parameters.
            max_grad_norm: Every norm in it is a number.
            is_padding: Boolean ``[B]``; samples marked True contribute exactly nothing.
            restore: From leaves to the structure that ``pre_clipping_transform`` sees.
            may_alias: The caller accepts sums that alias a CUDA graph's memory, which saves a copy of all of them.

        Raises:
            ValueError: If the arguments do not fit together.
            NotPerSampleError: If the loss cannot be attributed to single samples.
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
            sums = self._idle(idle, inputs, settings, None) if idle else _zeros(inputs, settings)
            return _empty(inputs, settings, groups, sums)
        run_rows: RunRows = self._eagerly(inputs, settings)
        if self.options.compile_mode is not None:
            rows, run_rows = self._compiled(inputs, settings)
        results: list[MicrobatchResult] = []
        total: list[Tensor] | None = None
        aliases = False
        for start in range(0, size, rows):
            part = slice(start, min(start + rows, size))
            result = run_rows(part, None if mask is None else mask[part])
            aliases = result.aliases_graph and may_alias and rows >= size
            total = result.sums if aliases else accumulate(total, result)
            # Else every microbatch's sums live to the end, or these through the next one.
            results.append(replace(result, sums=[]))
            del result
        sums = self._idle(idle, inputs, settings, total)
        if self.options.normalize_by != 1.0:
            sums, aliases = [s.div_(self.options.normalize_by) for s in sums], False
        aux = None
        if self.options.has_aux:
            aux = tree_map(lambda *leaves: torch.cat(leaves), *(result.aux for result in results))
        return ClippedBatch(sums, aux, _outcome(results, settings, groups, mask, size), aliases)

    def _idle(
        self, passes: int, inputs: Inputs, settings: Settings, sums: list[Tensor] | None
    ) -> list[Tensor]:
        """Take part in what other processes compute together, with a row of padding that contributes nothing."""
        if passes:
            rows = [
                leaf.new_zeros((1, *leaf.shape[1:])) if isinstance(leaf, Tensor) else leaf
                for leaf in inputs.batch
            ]
            run_rows = self._eagerly(replace(inputs, batch=rows, batch_size=1), settings)
            is_padding = torch.ones(1, dtype=torch.bool, device=inputs.params[0].device)
            for _ in range(passes):
                sums = accumulate(sums, run_rows(slice(0, 1), is_padding))
        assert sums is not None
        return sums

    def explain(
        self, inputs: Inputs, max_grad_norm: ClippingStrategy, *, restore: Restore = list
    ) -> Explanation:
        """Run the forward pass of one microbatch and tell how each parameter's norm would be found.

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
        samples = copied(inputs.rows(rows))
        with torch.enable_grad(), Generators(inputs.params[0].device).kept():
            tape, _, _ = self._with_loss(
                inputs,
                lambda loss: forward(loss, inputs.names, inputs.params, samples, settings),
            )
        try:
            return make_explanation(tape.tracked, plan(tape, settings), tape.batch_size)
        finally:
            tape.release()

    def sensitivity(self, max_grad_norm: ClippingStrategy, relation: Relation) -> float:
        """The largest L2 change of the sums between neighbouring batches."""
        key = owned(max_grad_norm), relation
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
        """Rows of the compiled graph, and what runs on it."""
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
        """The captured loss; where PyTorch cannot capture it, the refusal stands."""
        from clipgrad.loss_graph import CannotCapture

        try:
            return self._loss_graphs().of(inputs).loss()
        except CannotCapture as reason:
            where = f" It does so at {reason.where}." if reason.where else ""
            raise NotPerSampleError(f"{refusal}{where}") from reason

    def _graph_or_none(self, inputs: Inputs) -> Loss | None:
        """The captured loss; None where PyTorch cannot capture what it does now, so that its Python has to run."""
        from clipgrad.loss_graph import CannotCapture

        with suppress(CannotCapture):
            return self._loss_graphs().of(inputs).loss()
        return None

    def _with_loss(self, inputs: Inputs, body: Callable[[Loss], _T]) -> _T:
        """Run ``body`` on the loss; where its Python asks for values of tensors, on the graph of one sample's loss."""
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
        """The options resolved against parameters of these names, sizes and dtypes."""
        self.arithmetic.check_batch_size(inputs.batch_size)
        sizes = tuple(map(Tensor.numel, inputs.params))
        dtypes = tuple(map(_DTYPE, inputs.params))
        key = owned(max_grad_norm), inputs.names, sizes, dtypes
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
    """The user's transform of per-sample gradients, from leaves to leaves."""

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


def _zeros(inputs: Inputs, settings: Settings) -> list[Tensor]:
    """What a batch without samples adds up to."""
    pairs = zip(inputs.params, settings.dtypes, strict=True)
    totals = (torch.zeros_like(p, dtype=dtype) for p, dtype in pairs)
    return settings.ranks.summed(totals, inputs.params)


def _empty(
    inputs: Inputs, settings: Settings, groups: Sequence[str] | None, sums: list[Tensor]
) -> ClippedBatch:
    """The result of a batch without samples."""
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
        # A copy, also of a single one: the loss may have returned a view of something large.
        torch.cat([result.values for result in results]),
        [_joined(norms) for norms in zip(*(result.norms for result in results), strict=True)],
        settings.clipping.norms,
        groups,
        _joined([result.nonfinite for result in results]),
        mask,
        size - (0 if mask is None else int(mask.sum())),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Per-sample values of all microbatches, which nothing else holds."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
