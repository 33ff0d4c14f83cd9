"""This module holds ``clipped_grad``, which turns a loss function into its sum of per-sample clipped gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from clipgrad._tracebacks import UsersLines
from clipgrad.batch import BatchClipper
from clipgrad.clipping import ClippingStrategy, Relation, copy_strategy, relation_of
from clipgrad.engine.inputs import inputs_of_arguments
from clipgrad.explain import Explanation
from clipgrad.options import Options, Performance
from clipgrad.result import ClippedGradResult


@dataclass(frozen=True)
class ClippedGrad:
    """This class computes per-sample clipped gradients; ``clipped_grad`` makes it.

    The configuration is frozen, so ``sensitivity`` holds for every result.
    """

    fn: Callable[..., Any]
    max_grad_norm: ClippingStrategy
    argnums: int | tuple[int, ...]
    batch_argnums: tuple[int, ...] | None
    options: Options
    # Copies with another norm share the clipper and its compiled graphs; a copy with another loss must not.
    clipper: BatchClipper = field(repr=False, compare=False)

    def __call__(self, *args: Any, is_padding: Tensor | None = None) -> ClippedGradResult:
        """Compute the clipped sum of per-sample gradients.

        Args:
            *args: The arguments of ``fn``: parameters, then batch arguments with a leading batch axis.
            is_padding: Boolean ``[B]``; samples marked True contribute exactly nothing.

        Returns:
            The clipped sum and per-sample diagnostics.

        Raises:
            ValueError: If the arguments do not fit together.
            NotPerSampleError: If the loss has no gradient for single samples.
            CompileError: If the step cannot be compiled, with ``compile``.
        """
        inputs, restore = inputs_of_arguments(self.fn, self.argnums, self.batch_argnums, args)
        with UsersLines():
            found = self.clipper.clip(inputs, self.max_grad_norm, is_padding, restore=restore)
        return ClippedGradResult(restore(found.sums), found.aux, found.outcome)

    def sensitivity(self, relation: Relation = Relation.ADD_OR_REMOVE_ONE) -> float:
        """Return the largest L2 change of ``grads`` between neighbouring batches, from the configuration alone.

        =================  =====================  ===============================================
        configuration      add or remove one      remark
        =================  =====================  ===============================================
        flat, norm C       ``C / normalize_by``   twice that for ``REPLACE_ONE``
        groups, norms C_k  ``sqrt(sum C_k^2)``    divided by ``normalize_by``
        PerLayer, norm C   ``C``                  divided by ``normalize_by``
        Automatic, norm C  as for norm C          a sample contributes less than C
        ``C = inf``        ``inf``                no clipping, no guarantee
        not ``nan_safe``   ``inf``                one NaN sample could turn the whole sum into NaN
        =================  =====================  ===============================================

        The bound holds for exact arithmetic. In float32 the change of a sum can exceed it by about one part in
        ``1e5``; see ``docs/guarantees.md``. With a ``grid`` it holds to the last bit.
        """
        return self.clipper.sensitivity(self.max_grad_norm, relation_of(relation))

    def with_max_grad_norm(self, max_grad_norm: ClippingStrategy) -> ClippedGrad:
        """Return the same transform with another clipping norm; both share compiled graphs.

        Args:
            max_grad_norm: As for ``clipped_grad``.

        Raises:
            ValueError: If the norm is out of range.
        """
        self.clipper.arithmetic.clipping(max_grad_norm)
        return replace(self, max_grad_norm=copy_strategy(max_grad_norm))

    def explain(self, *args: Any) -> Explanation:
        """Run the forward pass of one microbatch and return how each parameter's norm would be computed.

        It runs on a copy of the batch, and PyTorch's RNG state is restored afterwards.

        Args:
            *args: As for a call.

        Returns:
            A table with parameter, uses, rule or fallback, strategy and reason, and estimated memory.

        Raises:
            ValueError: If the batch holds no sample.
        """
        inputs, restore = inputs_of_arguments(self.fn, self.argnums, self.batch_argnums, args)
        return self.clipper.explain(inputs, self.max_grad_norm, restore=restore)


def clipped_grad(
    fn: Callable[..., Any],
    *,
    max_grad_norm: ClippingStrategy,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    normalize_by: float = 1.0,
    pre_clipping_transform: Callable[[Any], Any] | None = None,
    microbatch_size: int | str | None = None,
    nan_safe: bool = True,
    compile: bool | str = False,
    grid: float | None = None,
    performance: Performance | None = None,
) -> ClippedGrad:
    """Transform a loss into the sum of its per-sample clipped gradients.

    The result computes ``sum_i min(1, C / ||g_i||) g_i``, where ``g_i`` is the gradient of ``fn`` on sample ``i`` alone
    (Abadi et al. 2016, arXiv:1607.00133), in one forward and one backward pass per microbatch.

    Args:
        fn: ``fn(params, *batch) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        max_grad_norm: Clipping norm C: one number for the whole gradient, or a mapping from parameter-name prefix to
            norm, where each group is clipped separately. ``inf`` does not clip, ``0`` gives zeros; other norms are at
            least 1.2e-10 (for float64 parameters 1.6e-145). ``PerLayer`` makes a group of each module. ``Automatic``
            may replace any number; it normalises instead of clipping.
        argnums: Positions of the parameters (any pytree of floating-point tensors) among ``fn``'s arguments.
        batch_argnums: Positions of the batch arguments (any pytrees of tensors, batch axis first). The default is every
            argument that is not in ``argnums``. Other arguments are passed on unchanged.
        has_aux: Whether ``fn`` also returns a pytree of tensors, which is returned per sample.
        keep_batch_dim: If True, ``fn`` sees a batch of one, so an ordinary loss works unchanged. If False, ``fn`` sees
            no batch axis. If an element of the batch is a group of samples (all samples of a user), groups are clipped.
        normalize_by: Divide the sum by this public constant, usually the expected batch size.
        pre_clipping_transform: A function that changes per-sample gradients (structure of the parameters,
            ``[B, *shape]``) before norms are computed. All per-sample gradients are then materialised, which takes
            ``B`` times the parameters' memory.
        microbatch_size: Number of samples that are processed at a time. It bounds memory and changes no result.
            ``"auto"`` doubles it from 1 during the first batch as long as half of the free memory suffices, and halves
            it if memory runs out; the logger ``clipgrad`` reports the number.
        nan_safe: Whether a sample whose gradient norm is not finite contributes exactly nothing, and is counted.
        compile: True, or a mode of ``torch.compile`` (``"reduce-overhead"`` uses CUDA graphs, ``"max-autotune"``):
            the step of a microbatch runs as one compiled graph. Compilation takes seconds to minutes, at the first
            batch and again if a value that the loss reads has changed (after ``model.eval()``, for example); the logger
            ``clipgrad`` reports it. Batches of any size share a graph. On a CPU it serves every size, unless
            ``microbatch_size`` is set or the step needs a fixed number of rows. In these cases, and always on a GPU,
            microbatches are padded to one number of rows, by default to the size of the first batch. The first batch is
            compared with the eager step.
        grid: Exact mode: round each sample's clipped gradient to multiples of this power of two, at most
            ``C / sqrt(elements)``; ``C / 2**20`` is a good choice. Sums are float64 and integer arithmetic, so
            ``sensitivity`` holds without rounding, and results do not depend on the order of the batch. Each sample
            runs alone for any ``microbatch_size``, which is slow. See ``docs/exact.md``.
        performance: Options for norms, random numbers and the dtype of the sums.

    Returns:
        A ``ClippedGrad``, which is called like ``fn``.

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
    options = Options(
        has_aux=has_aux,
        keep_batch_dim=keep_batch_dim,
        normalize_by=normalize_by,
        pre_clipping_transform=pre_clipping_transform,
        microbatch_size=microbatch_size,
        nan_safe=nan_safe,
        compile=compile,
        grid=grid,
        performance=Performance() if performance is None else performance,
    )
    clipper = BatchClipper(options)
    clipper.arithmetic.clipping(max_grad_norm)
    if isinstance(batch_argnums, int):
        batch_argnums = (batch_argnums,)
    return ClippedGrad(
        fn,
        copy_strategy(max_grad_norm),
        argnums if isinstance(argnums, int) else tuple(argnums),
        None if batch_argnums is None else tuple(batch_argnums),
        options,
        clipper,
    )
