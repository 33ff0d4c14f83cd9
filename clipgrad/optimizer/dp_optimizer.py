"""This module holds ``DPOptimizer``, which puts clipped gradients, noise and an ordinary optimizer together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypeVar

from clipgrad._phases import phase
from clipgrad._tracebacks import UsersLines
from clipgrad.batch import BatchClipper
from clipgrad.clipping import ClippingStrategy, Schedule, make_clipping
from clipgrad.engine.inputs import Inputs, inputs_of_model
from clipgrad.explain import Explanation
from clipgrad.noise import NoiseSource
from clipgrad.noise.step_noise import StepOfNoise
from clipgrad.optimizer import facts
from clipgrad.optimizer.batch_parts import by_name, parts_of
from clipgrad.optimizer.logical_batch import LogicalBatch
from clipgrad.optimizer.mechanism import make_mechanism
from clipgrad.optimizer.parameters import Resident
from clipgrad.optimizer.processes import ranks_of
from clipgrad.optimizer.requirements import check_parts, refuse_foreign_parameters
from clipgrad.options import Options, Performance
from clipgrad.plan import PrivacyPlan
from clipgrad.plan.receipts import Claim
from clipgrad.result import loss_and_metrics
from clipgrad.sampling import PaddedBatch

Returned = TypeVar("Returned", default=Any)
"""What the loss returns: a tensor, or a pair of a tensor and metrics."""


class DPOptimizer(LogicalBatch, Generic[Returned]):
    """This class wraps a ``torch.optim.Optimizer`` for differentially private training (DP-SGD, Abadi et al. 2016).

    Each ``backward`` adds to the clipped sums of per-sample gradients. ``step`` adds Gaussian noise of standard
    deviation ``noise_multiplier * sensitivity`` once, divides by ``expected_batch_size``, writes the result to
    ``.grad`` and steps the wrapped optimizer. From ``backward`` to ``step`` every ``.grad`` is None, so no optimizer
    can step on sums without noise. Schedulers and checkpoints see the wrapped optimizer.

    Args:
        optimizer: The optimizer to wrap. It owns the parameters to train.
        model: The model. Trainable parameters that ``optimizer`` does not own are treated as constants.
        loss_fn: ``loss_fn(model, *batch) -> scalar``, the function that a non-private loop calls on a whole batch. Here
            it sees a batch of one, so ``mean`` and ``sum`` reductions both work. It may return ``(scalar, metrics)``,
            with any pytree of tensors as metrics of the one sample.
        plan: A ``PrivacyPlan``, which replaces the next three arguments. Each step is then recorded in ``ledger``,
            ``epsilon()`` returns the cost so far, and steps beyond the plan are refused. Batches that no loader of this
            plan made are refused too, unless the plan declares its sampling.
        max_grad_norm: Clipping norm: a number, a mapping from parameter-name prefix to norm, ``PerLayer``,
            ``Automatic`` or ``AdaptiveQuantile``. A function of the step (0, 1, ...) that depends on no data may
            replace a number. All microbatches of a logical batch use the same norm. See ``docs/clipping.md``.
        noise_multiplier: Noise standard deviation per unit of sensitivity towards adding or removing one sample; a
            number or a function of the step. ``0`` clips without privacy (robust training) and has no epsilon.
        expected_batch_size: The public constant by which sums are divided: sampling rate times dataset size, not the
            size of the present batch, which is private.
        microbatch_size: Number of samples that are processed at a time. It bounds memory and changes no result.
            ``"auto"`` finds a number that fits; see ``clipped_grad``.
        keep_batch_dim: If False, ``loss_fn`` sees an element of the batch without a batch axis of one. With
            ``user_loader`` an element is a user with K samples, ``[K, ...]``, and users are clipped and protected.
        noise: The noise source. The default, ``SystemNoise()``, is seeded by the operating system.
            ``SeededNoise(generator)`` is repeatable, for experiments, and **not private**.
            ``DiscreteGaussianNoise(grid)`` chooses exact mode; see ``docs/exact.md``.
        compile: Run the step as one compiled graph; see ``clipped_grad``. Without ``microbatch_size`` it serves Poisson
            batches of every size. Batches above two standard deviations over ``expected_batch_size``, divided by the
            number of processes, run in parts.
            Recorded steps (``"reduce-overhead"``) pad a batch to one of up to 20 sizes, or of six if lengths differ. If
            all batches have the same size, pass this size as ``microbatch_size``.
        performance: Further options that change time and memory only.

    Raises:
        ValueError: If an argument is out of range, a parameter of the optimizer is not in the model, or no noise is
            large enough (``max_grad_norm=inf``).
        NotPerSampleError: If the model has BatchNorm in training mode.

    Examples:
        >>> import torch, clipgrad
        >>> model = torch.nn.Linear(3, 1)
        >>> def loss_fn(model, x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> optimizer = clipgrad.DPOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     model,
        ...     loss_fn,
        ...     max_grad_norm=1.0,
        ...     noise_multiplier=1.0,
        ...     expected_batch_size=8,
        ... )
        >>> loss = optimizer.backward(torch.randn(8, 3), torch.randn(8, 1))
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        loss_fn: Callable[..., Returned],
        *,
        plan: PrivacyPlan | None = None,
        max_grad_norm: ClippingStrategy | None = None,
        noise_multiplier: float | Schedule | None = None,
        expected_batch_size: float | None = None,
        microbatch_size: int | str | None = None,
        keep_batch_dim: bool = True,
        noise: NoiseSource | None = None,
        compile: bool | str = False,
        performance: Performance | None = None,
    ) -> None:
        check_parts(optimizer, model, loss_fn)
        chosen = make_mechanism(plan, max_grad_norm, noise_multiplier, expected_batch_size, noise)
        options = Options(
            has_aux=None,
            keep_batch_dim=keep_batch_dim,
            microbatch_size=microbatch_size,
            compile=compile,
            grid=chosen.grid,
            performance=Performance() if performance is None else performance,
        )
        ranks, room = ranks_of(options, model), None
        if compile and microbatch_size is None:
            from clipgrad.compiled import fixed_size  # PyTorch's compiler takes seconds to import

            room = fixed_size(chosen.expected_batch_size / ranks.size)
        super().__init__(optimizer, chosen, BatchClipper(options, ranks, room), noise, plan)
        self.model = model
        self.loss_fn = loss_fn
        self._start_batch()
        names, sizes = self._trained.names, [p.numel() for p in self._trained.parameters]
        # Refuse impossible noise now, not at the first step.
        clipping = make_clipping(self.max_grad_norm, names, sizes)
        self._clipper.arithmetic.check_noise(clipping, sizes, self.sigma)
        ranks.prepare(model, self._settings_of_run, lambda: self.noise.state_dict())
        if self._account is not None:
            self._account.share_name(ranks)

    # ------------------------------------------------------------------ the training loop

    def backward(self, *batch: Any, is_padding: Tensor | None = None, **named: Any) -> Returned:
        """Add the batch's clipped per-sample gradients to the sums to which ``step`` adds noise.

        All calls before a ``step`` form one logical batch. One batch of the loader is one step. A large batch may be
        split over several calls. Never add up several batches of the loader, never use a batch in two steps, and never
        give a batch to two optimizers: sampling rate and epsilon would differ from the accounted ones. With a plan,
        such batches are refused. For larger batches, plan a larger ``expected_batch_size``.

        Args:
            *batch: The arguments of ``loss_fn`` after the model: pytrees of tensors, batch axis first; or one
                ``PaddedBatch`` of a loader with ``pad=True``. The batch may be empty. Mappings such as Hugging Face's
                ``BatchEncoding`` reach the loss as dictionaries, without columns of strings.
            is_padding: Boolean ``[B]``; samples marked True contribute exactly nothing.
            **named: The arguments of ``loss_fn`` by name: ``backward(**batch)`` calls ``loss_fn(model, **batch)``.

        Returns:
            The mean per-sample loss, detached; NaN for an empty batch. If the loss returns ``(loss, metrics)``, a named
            pair ``NotPrivate(loss, metrics)`` of the mean loss and the metrics of each sample that is not padding,
            stacked on a leading axis. It is not private.

        Raises:
            ValueError: If the batch is malformed, or a tensor in it requires grad.
            UnaccountedBatchError: With a plan, if the rows are not from one batch of a loader of the plan.
            UnclippedGradientError: If a ``.grad`` holds a gradient that was not clipped here, or the parameters to
                train have changed since the first call of the logical batch.
            NotPerSampleError: If the loss has no gradient for single samples.
        """
        if len(batch) == 1 and isinstance(batch[0], PaddedBatch) and is_padding is None:
            is_padding = batch[0].is_padding
            inside = batch[0].batch
            batch = tuple(inside) if isinstance(inside, tuple | list) else (inside,)
        batch = parts_of(batch, named)
        trained, claim = self._find_trained_parameters(), self._claim
        if self._account is not None:
            claim = self._account.claim(claim, batch, is_padding)
        self._pending.before_backward(trained.names, trained.parameters)
        with trained.resident(self._clipper.ranks, self._step_state.step) as resident:
            inputs = self._inputs(resident, batch, bool(named), "backward(*batch)")
            self._numbers.check(inputs.batch, inputs.batch_size)
            with UsersLines():
                found = self._clipper.clip(inputs, self._norm(), is_padding, may_alias=True)
        self._pending.add(
            trained.parameters,
            found.sums,
            self._step_state.observed_sums(found.outcome),
            aliases_graph=found.aliases_graph,
        )
        self._claim = claim
        self._keep(found.outcome)
        return cast(Returned, loss_and_metrics(found.outcome, found.aux))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Add noise to the clipped sums, divide them by ``expected_batch_size``, and step the wrapped optimizer.

        Args:
            closure: Must be None.

        Raises:
            ValueError: If a closure is given.
            PrivacyBudgetError: If all steps of the plan were taken. Nothing is released then.
            UnaccountedBatchError: With a plan, if the logical batch is not one whole batch of a loader of the plan.
            UnclippedGradientError: If there was no ``backward`` since the last step, or other code wrote to a
                ``.grad`` since then. No parameter is changed then.
        """
        if closure is not None:
            raise ValueError(
                "step: a closure would compute gradients again after the noise was added, unclipped. Call "
                "backward(*batch) and then step(). Lightning passes a closure: use "
                "clipgrad.integrations.lightning.DPModule. Optimizers that need one (LBFGS) cannot be private here."
            )
        account = self._account
        if account is not None and self._pending.unfinished:
            account.check_step(self._claim, self._step_state.step)
        sigma, sigma_observed = self.sigma, self._noise_levels()[1]
        names, parameters = self._trained.names, self._trained.parameters
        selected = set(map(id, parameters))
        others = [p for p in self._owned_parameters() if id(p) not in selected]
        sums, observed, aliases_graph = self._pending.take(names, parameters, others)
        claim, self._claim = self._claim, Claim()
        ranks = self._clipper.ranks
        ranks.meet("step", self._step_state.step, lambda: self._facts_of_step(claim), parameters)
        if account is not None:
            account.record(claim, self.accounted_noise_multiplier)
        noised = StepOfNoise(self._noise, self._step_state.step, sigma, self.expected_batch_size)
        with torch.no_grad(), phase("noise"):
            means = ranks.means(sums, parameters, names, noised, aliases_graph=aliases_graph)
            if observed:
                ranks.one_draw(observed, lambda total: self._noise.count(total, sigma_observed))
        self._pending.publish(parameters, means)
        # Sums of a CUDA graph may be without noise: a traceback from the wrapped optimizer must not refer to them.
        del sums
        # The step is over before the wrapped optimizer runs, because the means are public and the optimizer may raise.
        self._step_state = self._step_state.next_step(observed, self.expected_batch_size)
        # Whole parameters that other code has gathered would keep the values from before this step.
        ranks.release(self.model)
        with phase("optimizer"):
            self.inner.step()

    def explain(self, *batch: Any, **named: Any) -> Explanation:
        """Return a table of how each parameter's norm is computed for such a batch; this changes no state."""
        batch = parts_of(batch, named)
        trained = self._find_trained_parameters()
        with trained.resident(self._clipper.ranks, self._step_state.step) as resident:
            inputs = self._inputs(resident, batch, bool(named), "explain(*batch)")
            return self._clipper.explain(inputs, self._norm())

    # ------------------------------------------------------------------ torch.optim.Optimizer

    def __repr__(self) -> str:
        return (
            f"DPOptimizer(max_grad_norm={self.max_grad_norm}, noise_multiplier={self.noise_multiplier}, "
            f"expected_batch_size={self.expected_batch_size}, inner={self.inner!r})"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model to the wrapped optimizer; the next ``backward`` clips them too."""
        given = param_group["params"]
        if not isinstance(given, Tensor | set):
            given = list(given)  # a generator can be read once only
            param_group = {**param_group, "params": given}
        listed = [given] if isinstance(given, Tensor) else given
        added = [p[1] if isinstance(p, tuple) else p for p in listed]
        refuse_foreign_parameters(added, self.model.parameters())
        self.inner.add_param_group(param_group)

    # ------------------------------------------------------------------ inside

    def _inputs(self, resident: Resident, batch: tuple[Any, ...], named: bool, call: str) -> Inputs:
        names, parameters, holding = resident
        loss_fn: Callable[..., Any] = self.loss_fn
        if named:
            # The same function in each step, since what was captured of it is kept by its identity.
            if self._loss_by_name is None or self._loss_by_name[0] is not loss_fn:
                self._loss_by_name = loss_fn, by_name(loss_fn)
            loss_fn = self._loss_by_name[1]
        handed_out = () if self._account is None else self._account.handed_out()
        return inputs_of_model(
            loss_fn, self.model, names, parameters, holding, batch, call, handed_out
        )

    def _settings_of_run(self) -> dict[str, object]:
        return facts.of_run(
            None if self._account is None else self._account.plan,
            self._norm(),
            self.noise_multiplier,
            self.expected_batch_size,
            self._trained.names,
            self._trained.parameters,
            self.inner,
        )

    def _facts_of_step(self, claim: Claim) -> dict[str, object]:
        account = self._account
        position = () if account is None else account.position(claim, self._clipper.ranks)
        return facts.of_step(self._norm(), self.sigma, self._trained.names, position)
