"""``clipped_grad``: from a loss function to its per-sample clipped, summed gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from clipgrad import _validate
from clipgrad.clipping import (
    ClippingStrategy,
    Relation,
    is_grouped,
    make_clipping,
    refuse_tiny_norms,
    relation_of,
    sensitivity,
)
from clipgrad.compiled import MODES, Compiler, MicrobatchRunner
from clipgrad.engine.branches import BRANCHES, Disagreement
from clipgrad.engine.clip_and_sum import (
    MicrobatchResult,
    Settings,
    accumulate,
)
from clipgrad.engine.inputs import Inputs
from clipgrad.engine.microbatch import forward, plan, run
from clipgrad.engine.rng_state import Generators
from clipgrad.engine.split import Parts
from clipgrad.engine.tape import Strategy, Tape
from clipgrad.exact.grid import (
    Grid,
    alone,
    check_grid,
    check_options,
    check_samples,
    exact_sensitivity,
)
from clipgrad.explain import Explanation, make_explanation
from clipgrad.result import ClippedGradResult, Outcome

RANDOMNESS = ("different", "same", "error")
STRATEGIES = ("auto", *(strategy.value for strategy in Strategy))


@dataclass(frozen=True)
class ClippedGrad:
    """A per-sample clipped gradient function; made by ``clipped_grad``.

    The configuration is frozen, so ``sensitivity`` is a fact about every result.
    """

    fn: Callable[..., Any]
    max_grad_norm: ClippingStrategy
    argnums: int | tuple[int, ...] = 0
    batch_argnums: tuple[int, ...] | None = None
    has_aux: bool = False
    keep_batch_dim: bool = True
    normalize_by: float = 1.0
    rescale_to_unit_norm: bool = False
    pre_clipping_transform: Callable[[Any], Any] | None = None
    accumulate_dtype: torch.dtype | None = None
    microbatch_size: int | None = None
    nan_safe: bool = True
    randomness: str = "different"
    strategy: str = "auto"
    memory_budget: float | None = None
    branches: str = "refuse"
    compile: bool | str = False
    grid: float | None = None
    _compiler: Compiler | None = field(init=False, repr=False, compare=False)
    # Not arguments either: a copy with another norm must not find what was resolved for this one.
    _settings_cache: dict[tuple[Any, ...], Settings] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )
    _sensitivity_cache: dict[Relation, float] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        mode = "default" if self.compile is True else self.compile
        # Not an argument: a copy with another loss compiles for itself.
        object.__setattr__(self, "_compiler", Compiler(mode) if mode else None)

    def __call__(self, *args: Any, is_padding: Tensor | None = None) -> ClippedGradResult:
        """Compute the clipped sum of per-sample gradients.

        Args:
            *args: The arguments of ``fn``: parameters, then batch arguments with a leading batch axis.
            is_padding: Boolean ``[B]``; samples marked True contribute exactly nothing.

        Returns:
            The clipped sum and per-sample diagnostics.

        Raises:
            ValueError: If the arguments do not fit together.
            NotPerSampleError: If the loss does something that cannot be attributed to single samples.
            CompileError: If ``compile`` is asked for and the step cannot be compiled.
        """
        return self._call(args, is_padding, lend=False)[0]

    def lending(
        self, *args: Any, is_padding: Tensor | None = None
    ) -> tuple[ClippedGradResult, bool]:
        """The same, and whether ``grads`` are only lent; for :class:`clipgrad.DPOptimizer`.

        What is lent is overwritten by the next call: a CUDA graph's own memory, of which a copy would be a pass over
        all sums.

        Args:
            *args: As for a call.
            is_padding: Likewise.
        """
        return self._call(args, is_padding, lend=True)

    def _call(
        self, args: tuple[Any, ...], is_padding: Tensor | None, *, lend: bool
    ) -> tuple[ClippedGradResult, bool]:
        compiler = self._compiler
        inputs = Inputs.bind(
            self.fn, self.argnums, self.batch_argnums, args, aliased=compiler is not None
        )
        size = inputs.batch_size
        mask = _validate.padding_mask(is_padding, size)
        settings = self._settings(inputs)
        if size == 0:
            return self._empty(inputs, settings), False
        step, compiled = self._rows_at_once(size), None
        if compiler is not None:
            step = compiler.rows(self.microbatch_size, size)
            compiled = MicrobatchRunner(compiler, inputs, settings, step)
        lend = lend and step >= size and self.normalize_by == 1.0
        pieces: list[MicrobatchResult] = []
        sums: list[Tensor] | None = None
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            marked = None if mask is None else mask[rows]
            if compiled is not None:
                piece = compiled(rows, marked)
            else:
                batch = inputs.rows(rows)
                piece = run(
                    inputs.loss,
                    inputs.names,
                    inputs.params,
                    batch if self.grid is None else alone(batch),
                    marked,
                    settings,
                )
            lend = lend and piece.lent
            if lend:
                sums = piece.sums
                pieces.append(piece)
                break
            sums = accumulate(sums, piece)
            pieces.append(replace(piece, sums=[]))  # else every microbatch's sums live to the end,
            del piece  # or these through the next one
        assert sums is not None
        return self._result(inputs, settings, sums, pieces, mask), lend

    def sensitivity(self, relation: Relation = Relation.ADD_OR_REMOVE_ONE) -> float:
        """The largest L2 change of ``grads`` between neighbouring batches, from the configuration alone.

        =================  =====================  ===============================================
        configuration      add or remove one      remark
        =================  =====================  ===============================================
        flat, norm C       ``C / normalize_by``   twice that for ``REPLACE_ONE``
        groups, norms C_k  ``sqrt(sum C_k^2)``    divided by ``normalize_by``
        PerLayer, norm C   ``C``                  divided by ``normalize_by``
        Automatic, norm C  that of norm C         a sample contributes less than C
        rescaled           ``sqrt(groups)``       divided by ``normalize_by``
        ``C = inf``        ``inf``                no clipping, no guarantee
        not ``nan_safe``   ``inf``                one NaN sample could turn the whole sum into NaN
        =================  =====================  ===============================================

        Rounding: the bound holds for exact arithmetic. In float32 the change of a sum can exceed it by about
        one part in ``1e5``; see ``docs/guarantees.md``. With a ``grid`` it holds to the last bit.
        """
        relation = relation_of(relation)
        if isinstance(self.max_grad_norm, Mapping):  # which could be written to
            return self._sensitivity(relation)
        if relation not in self._sensitivity_cache:
            self._sensitivity_cache[relation] = self._sensitivity(relation)
        return self._sensitivity_cache[relation]

    def _sensitivity(self, relation: Relation) -> float:
        clipping = make_clipping(self.max_grad_norm, rescale=self.rescale_to_unit_norm)
        if self.grid is not None:
            return exact_sensitivity(clipping, relation)
        return sensitivity(
            clipping, relation, normalize_by=self.normalize_by, nan_safe=self.nan_safe
        )

    def with_max_grad_norm(self, max_grad_norm: ClippingStrategy) -> ClippedGrad:
        """The same transform with another clipping norm; what is compiled already serves both.

        Args:
            max_grad_norm: As for ``clipped_grad``.

        Raises:
            ValueError: If it is out of range.
        """
        clipping = make_clipping(max_grad_norm, rescale=self.rescale_to_unit_norm)
        if self.grid is not None:
            check_grid(self.grid, clipping, max_grad_norm)
        other = replace(self, max_grad_norm=_owned(max_grad_norm))
        object.__setattr__(other, "_compiler", self._compiler)
        return other

    def explain(self, *args: Any) -> Explanation:
        """Run the forward pass of one microbatch and tell how each parameter's norm would be found.

        It runs on a copy of the batch, and PyTorch's random number generators are given back as they were.

        Args:
            *args: As for a call.

        Returns:
            A table: parameter, uses, rule or fallback, strategy and why, estimated memory.

        Raises:
            ValueError: If the batch holds no sample.
        """
        inputs = Inputs.bind(self.fn, self.argnums, self.batch_argnums, args)
        if inputs.batch_size == 0:
            raise ValueError(
                "explain needs a batch of at least one sample; the estimates depend on it."
            )
        settings = self._settings(inputs)
        rows = slice(0, min(self._rows_at_once(inputs.batch_size), inputs.batch_size))
        with torch.enable_grad(), Generators(inputs.params[0].device).kept():
            tape = _first_part(inputs, inputs.rows(rows), settings)
        try:
            return make_explanation(tape.tracked, plan(tape, settings), tape.batch_size)
        finally:
            tape.release()

    def _settings(self, inputs: Inputs) -> Settings:
        if self.grid is not None:
            check_samples(inputs.batch_size, "batch size")
        params = inputs.params
        sizes, dtypes = tuple(map(Tensor.numel, params)), tuple(map(_DTYPE, params))
        key = tuple(inputs.names), sizes, dtypes
        settings = self._settings_cache.get(key)
        if settings is None:
            settings = self._settings_cache[key] = self._resolved(*key)
        if self.pre_clipping_transform is None:
            return settings
        return replace(settings, pre_clipping=self._pre_clipping(inputs))

    def _resolved(
        self, names: tuple[str, ...], sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> Settings:
        """The configuration for parameters of these names, sizes and dtypes."""
        clipping = make_clipping(
            self.max_grad_norm, names, sizes, rescale=self.rescale_to_unit_norm
        )
        refuse_tiny_norms(clipping, dtypes)
        return Settings(
            clipping=clipping,
            dtypes=tuple(map(self._accumulation, dtypes)),
            randomness=self.randomness,
            keep_batch_dim=self.keep_batch_dim,
            has_aux=self.has_aux,
            nan_safe=self.nan_safe,
            strategy=None if self.strategy == "auto" else Strategy(self.strategy),
            memory_budget=self.memory_budget,
            pre_clipping=None,
            branches=self.branches,
            grid=None if self.grid is None else Grid(self.grid, clipping, sizes),
        )

    def _rows_at_once(self, size: int) -> int:
        return 1 if self.grid is not None else self.microbatch_size or size

    def _accumulation(self, dtype: torch.dtype) -> torch.dtype:
        if self.grid is not None:
            return torch.float64
        return self.accumulate_dtype or torch.promote_types(dtype, torch.float32)

    def _pre_clipping(self, inputs: Inputs) -> Callable[[list[Tensor]], list[Tensor]]:
        transform = self.pre_clipping_transform
        assert transform is not None

        def apply(gradients: list[Tensor]) -> list[Tensor]:
            before = inputs.restore(gradients)
            leaves, structure = tree_flatten(transform(before))
            shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
            floating = all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
            if (
                not floating
                or structure != tree_flatten(before)[1]
                or shapes != [tuple(g.shape) for g in gradients]
            ):
                raise ValueError(
                    "pre_clipping_transform must return per-sample gradients of the structure and shapes it "
                    "received (a floating-point [B, *parameter.shape] for every parameter)."
                )
            return leaves

        return apply

    def _empty(self, inputs: Inputs, settings: Settings) -> ClippedGradResult:
        device = inputs.params[0].device
        sums = [
            torch.zeros_like(p, dtype=dtype)
            for p, dtype in zip(inputs.params, settings.dtypes, strict=True)
        ]
        none = torch.zeros(0, dtype=settings.dtypes[0], device=device)
        norms = [none for _ in settings.clipping.groups]
        return ClippedGradResult(
            inputs.restore(sums),
            none,
            self._norms(settings, norms),
            None,
            0,
            Outcome(norms, settings.clipping.norms, none.bool(), None),
        )

    def _norms(self, settings: Settings, norms: Sequence[Tensor]) -> Tensor | Mapping[str, Tensor]:
        if is_grouped(self.max_grad_norm):
            return dict(zip(settings.clipping.groups, norms, strict=True))
        return norms[0]

    def _result(
        self,
        inputs: Inputs,
        settings: Settings,
        sums: list[Tensor],
        pieces: list[MicrobatchResult],
        mask: Tensor | None,
    ) -> ClippedGradResult:
        if self.normalize_by != 1.0:
            sums = [total.div_(self.normalize_by) for total in sums]
        norms = [_joined(group) for group in zip(*(piece.norms for piece in pieces), strict=True)]
        nonfinite = _joined([piece.nonfinite for piece in pieces])
        aux = (
            tree_map(lambda *leaves: torch.cat(leaves), *(piece.aux for piece in pieces))
            if self.has_aux
            else None
        )
        return ClippedGradResult(
            grads=inputs.restore(sums),
            # A copy also of a single piece's, and of aux: the loss may have returned a view of something large.
            values=torch.cat([piece.values for piece in pieces]),
            grad_norms=self._norms(settings, norms),
            aux=aux,
            batch_size=inputs.batch_size - (0 if mask is None else int(mask.sum())),
            outcome=Outcome(norms, settings.clipping.norms, nonfinite, mask),
        )


_DTYPE = attrgetter("dtype")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Per-sample values of all microbatches, which nothing else holds."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _first_part(inputs: Inputs, batch: list[Any], settings: Settings) -> Tape:
    """The tape of a copy of a microbatch; of the samples that branch as the first one does, if it splits."""
    parts = Parts(batch)
    for rows, _ in parts:
        try:
            return forward(inputs.loss, inputs.names, inputs.params, rows, settings)[0]
        except Disagreement as disagreement:
            parts.split(disagreement)
    raise AssertionError("a single sample agrees with itself")


def clipped_grad(
    fn: Callable[..., Any],
    *,
    max_grad_norm: ClippingStrategy,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    normalize_by: float = 1.0,
    rescale_to_unit_norm: bool = False,
    pre_clipping_transform: Callable[[Any], Any] | None = None,
    accumulate_dtype: torch.dtype | None = None,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    randomness: str = "different",
    strategy: str = "auto",
    memory_budget: float | None = None,
    branches: str = "refuse",
    compile: bool | str = False,
    grid: float | None = None,
) -> ClippedGrad:
    """Transform a loss into the sum of its per-sample clipped gradients.

    Computes ``sum_i min(1, C / ||g_i||) g_i`` with ``g_i`` the gradient of ``fn`` on sample ``i`` alone (Abadi et
    al. 2016, arXiv:1607.00133), in one forward and one backward pass over the whole microbatch.

    Args:
        fn: ``fn(params, *batch) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        max_grad_norm: Clipping norm C: one number for the whole gradient, or a mapping from parameter-name
            prefix to norm, each group clipped on its own. ``inf`` does not clip, ``0`` gives zeros; other norms are at
            least 1.2e-10 (for float64 parameters 1.6e-145). ``PerLayer`` makes
            a group of each module; ``Automatic``, anywhere in place of a number, normalises instead of clipping.
        argnums: Positions of the parameters (any pytree of floating-point tensors) among ``fn``'s arguments.
        batch_argnums: Positions of the batch arguments (any pytrees of tensors, batch axis first). Default: every
            argument that is not in ``argnums``. Other arguments are passed through unchanged.
        has_aux: ``fn`` also returns a pytree of tensors, handed back per sample.
        keep_batch_dim: True: ``fn`` sees a batch of one, so an ordinary loss works unchanged. False: the batch axis
            is removed; if the elements of the batch are groups of samples (all samples of a user), this clips per
            group.
        normalize_by: Divide the sum by this public constant, usually the expected batch size.
        rescale_to_unit_norm: Divide clipped gradients by their clipping norm, so that the bound is 1.
        pre_clipping_transform: Per-sample gradients (the structure of params, ``[B, *shape]``) to gradients of the
            same structure, before norms are taken. Forces per-sample gradients to be materialised, which costs
            ``B`` times the parameters' memory.
        accumulate_dtype: Dtype of the sums. Default: the parameter's own, at least float32.
        microbatch_size: Process the batch in pieces of this size. Peak memory follows it, results do not.
        nan_safe: A sample whose gradient norm is not finite contributes exactly nothing and is counted.
        randomness: ``"different"``: each sample its own dropout mask; ``"same"``; ``"error"``.
        strategy: ``"auto"``, or force ``"kept"``, ``"ghost"`` or ``"recompute"`` where they apply; see
            ``explain``. Changes time and memory only.
        memory_budget: Bytes that kept per-sample gradients may take beyond the factors they replace.
        branches: What to do where ``fn`` asks for the value of a tensor (``if mask.all():``, ``.item()``), which
            differs from sample to sample. ``"refuse"`` raises. ``"split"`` runs the samples that answer alike
            together, in as many passes as there are answers: exact, but ``fn`` runs several times a batch, each time
            on a copy, and each question waits for the device. A question whose answer was drawn raises where samples
            differ. For models whose own code branches (masks in Hugging Face models).
        compile: True, or a mode of ``torch.compile`` (``"reduce-overhead"`` uses CUDA graphs, ``"max-autotune"``):
            the whole step of a microbatch runs as one compiled graph. Compiling takes seconds to minutes, at the
            first batch and again when something changes that the loss reads (``model.eval()``, say); the logger
            ``clipgrad`` tells. Every microbatch is padded to ``microbatch_size`` rows (default: the size of the first
            batch), so batches of any size share a graph. The first batch is compared with the eager step. Not
            together with ``branches="split"``.
        grid: Exact mode: round each sample's clipped gradient to multiples of this power of two, at most
            ``C / sqrt(elements)``; ``C / 2**20`` is a good choice. Sums are float64 and integer arithmetic, so
            ``sensitivity`` holds without rounding, and results do not depend on the order of the batch. Each sample
            passes alone, whatever ``microbatch_size`` says, which is slow. See ``docs/exact.md``.

    Returns:
        A ``ClippedGrad``; call it like ``fn``.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch, clipgrad
        >>> def loss(params, x, y):
        ...     return torch.nn.functional.mse_loss(x @ params["w"] + params["b"], y)
        >>> params = {"w": torch.zeros(3, 1), "b": torch.zeros(1)}
        >>> gradient = clipgrad.clipped_grad(loss, max_grad_norm=1.0)
        >>> result = gradient(params, torch.ones(4, 3), torch.ones(4, 1))
        >>> result.grads["b"], result.grad_norms  # each of four norms of 4 is clipped to 1
        (tensor([-2.]), tensor([4., 4., 4., 4.]))
        >>> gradient.sensitivity()
        1.0
    """
    clipping = make_clipping(max_grad_norm, rescale=rescale_to_unit_norm)
    if grid is not None:
        grid = check_grid(grid, clipping, max_grad_norm)
        check_options(
            normalize_by=normalize_by,
            rescale=rescale_to_unit_norm,
            accumulate_dtype=accumulate_dtype,
            nan_safe=nan_safe,
            compile=compile,
        )
    if memory_budget is not None and not _validate.number("memory_budget", memory_budget) >= 0:
        raise ValueError(
            f"memory_budget must be a non-negative number of bytes, got {memory_budget!r}."
        )
    if isinstance(batch_argnums, int):
        batch_argnums = (batch_argnums,)
    return ClippedGrad(
        fn=fn,
        max_grad_norm=_owned(max_grad_norm),
        argnums=argnums if isinstance(argnums, int) else tuple(argnums),
        batch_argnums=None if batch_argnums is None else tuple(batch_argnums),
        has_aux=has_aux,
        keep_batch_dim=keep_batch_dim,
        normalize_by=_validate.positive("normalize_by", normalize_by),
        rescale_to_unit_norm=rescale_to_unit_norm,
        pre_clipping_transform=pre_clipping_transform,
        accumulate_dtype=_validate.accumulate_dtype(accumulate_dtype),
        microbatch_size=_validate.positive_int_or_none("microbatch_size", microbatch_size),
        nan_safe=_validate.flag("nan_safe", nan_safe),
        randomness=_validate.one_of("randomness", randomness, RANDOMNESS),
        strategy=_validate.one_of("strategy", strategy, STRATEGIES),
        memory_budget=memory_budget,
        branches=_validate.one_of("branches", branches, BRANCHES),
        compile=_compile_mode(compile, branches),
        grid=grid,
    )


def _owned(max_grad_norm: ClippingStrategy) -> ClippingStrategy:
    """A mapping as it is now, whatever its owner does to it later."""
    return dict(max_grad_norm) if isinstance(max_grad_norm, Mapping) else max_grad_norm


def _compile_mode(mode: bool | str, branches: str) -> bool | str:
    if isinstance(mode, bool) and not mode:
        return False
    if branches == "split":
        raise ValueError(
            "compile cannot be combined with branches='split': a graph has no branches. Leave one of them out."
        )
    return mode if mode is True else _validate.one_of("compile", mode, MODES)
