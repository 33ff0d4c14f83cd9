"""``DPOptimizer``: clipped gradients, noise and an ordinary optimizer, composed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipgrad._phases import phase
from clipgrad.accounting import Ledger
from clipgrad.batch import BatchClipper
from clipgrad.clipping import ClippingStrategy, Progress, Relation, Schedule, make_clipping, owned
from clipgrad.engine.advice import note_arguments
from clipgrad.engine.inputs import Inputs, of_model
from clipgrad.errors import UnclippedGradientError
from clipgrad.explain import Explanation
from clipgrad.noise import NoiseSource
from clipgrad.optimizer import facts
from clipgrad.optimizer.facade import OptimizerFacade
from clipgrad.optimizer.mechanism import mechanism, refuse_adaptive_on_grid, step_noise
from clipgrad.optimizer.parameters import Resident, TrainedParameters
from clipgrad.optimizer.pending import Pending, refuse_unnoised
from clipgrad.optimizer.requirements import (
    check_batch,
    check_parts,
    refuse_foreign_parameters,
    rows_in,
)
from clipgrad.options import Options, Performance
from clipgrad.plan import PrivacyPlan
from clipgrad.plan.account import Account
from clipgrad.plan.receipts import Claim
from clipgrad.ranks import OneProcess, Ranks, initialised
from clipgrad.result import Diagnostics, Outcome, diagnostics_of
from clipgrad.sampling import PaddedBatch

_STATE_KEY = "clipgrad"


class DPOptimizer(OptimizerFacade):
    """Wraps any ``torch.optim.Optimizer`` for differentially private training (DP-SGD, Abadi et al. 2016).

    Each ``backward`` adds to the clipped sums of per-sample gradients. ``step`` adds Gaussian noise of standard
    deviation ``noise_multiplier * sensitivity`` once, divides by ``expected_batch_size``, writes the result to
    ``.grad`` and lets the wrapped optimizer step. From ``backward`` to ``step`` every ``.grad`` is None, so that nobody
    can step on sums without noise. To schedulers and checkpoints it is the wrapped optimizer.

    Args:
        optimizer: The optimizer to wrap. It owns the parameters to train.
        model: The model. Its trainable parameters that ``optimizer`` does not own are constants.
        loss_fn: ``loss_fn(model, *batch) -> scalar``, the function a non-private loop calls on a whole batch. Here
            it sees a batch of one, so ``mean`` and ``sum`` reductions both work.
        plan: A ``PrivacyPlan``, in place of the next three. Every step is then written to ``ledger``, ``epsilon()``
            tells what it cost so far, and a step beyond the plan is refused. So is a batch that no loader of this plan
            drew, unless the plan declares how batches are drawn.
        max_grad_norm: Clipping norm; a number, or a mapping from parameter-name prefix to norm, or ``PerLayer``,
            ``Automatic`` or ``AdaptiveQuantile``. In place of a number, a function of the step (0, 1, ...) that
            depends on no data. It is the same for all of a logical batch. See ``docs/clipping.md``.
        noise_multiplier: Noise standard deviation per unit of sensitivity towards adding or removing one sample; a
            number or a function of the step. ``0`` clips without privacy (robust training), a use of its own: no
            epsilon belongs to it.
        expected_batch_size: The public constant that sums are divided by: sampling rate times dataset size, not the
            size of the batch at hand, which is private.
        microbatch_size: Process a batch in pieces of this size; bounds memory, changes no result.
        keep_batch_dim: False: ``loss_fn`` sees an element of the batch without a batch axis of one: ``[K, ...]`` if the
            element is a user with K samples (``user_loader``), who is then what is clipped, counted and protected.
        noise: Where noise comes from; default ``SystemNoise()``, seeded by the operating system.
            ``SeededNoise(generator)`` repeats itself, for experiments, and is **not private**.
            ``DiscreteGaussianNoise(grid)`` chooses exact mode, see ``docs/exact.md``.
        compile: Run the step as one compiled graph; see ``clipped_grad``. Without ``microbatch_size`` the graph has
            room for a Poisson batch two standard deviations above ``expected_batch_size``; if all your batches have
            the same size, pass that as ``microbatch_size``, and no row is wasted. The default noise source is compiled
            too.
        performance: ``Performance(...)``: what else changes time and memory only.

    Raises:
        ValueError: If an argument is out of range, a parameter of the optimizer is not in the model, or noise is
            asked for where no noise is enough (``max_grad_norm=inf``).
        NotPerSampleError: If the model holds BatchNorm in training mode.

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

    _trained: TrainedParameters
    _pending: Pending
    _claim: Claim
    _last: Outcome | None

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        *,
        plan: PrivacyPlan | None = None,
        max_grad_norm: ClippingStrategy | None = None,
        noise_multiplier: float | Schedule | None = None,
        expected_batch_size: float | None = None,
        microbatch_size: int | None = None,
        keep_batch_dim: bool = True,
        noise: NoiseSource | None = None,
        compile: bool | str = False,
        performance: Performance | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: param_groups, state and hooks are the wrapped optimizer's.
        check_parts(optimizer, model, loss_fn)
        chosen = mechanism(plan, max_grad_norm, noise_multiplier, expected_batch_size, noise)
        self.inner = optimizer
        self.model = model
        self.loss_fn = loss_fn
        self._mechanism = chosen
        self._progress = Progress.start(chosen.max_grad_norm, chosen.noise_multiplier)
        if compile and microbatch_size is None:
            from clipgrad.compiled import fixed_size  # PyTorch's compiler takes seconds to import

            microbatch_size = fixed_size(self.expected_batch_size)
        options = Options(
            keep_batch_dim=keep_batch_dim,
            microbatch_size=microbatch_size,
            compile=compile,
            grid=chosen.grid,
            performance=Performance() if performance is None else performance,
        )
        ranks = _ranks(options, model)
        self._clipper = BatchClipper(options, ranks)
        arithmetic = self._clipper.arithmetic
        self._noise = step_noise(noise, arithmetic, self.expected_batch_size)
        self._account = None if plan is None else Account(plan, self._noise.accounting)
        refuse_adaptive_on_grid(self._progress, arithmetic)
        arithmetic.check(self.max_grad_norm)
        self._start()
        names, sizes = self._trained.names, [p.numel() for p in self._trained.parameters]
        # Noise that cannot exist is refused here, not at the first step.
        arithmetic.check_noise(make_clipping(self.max_grad_norm, names, sizes), sizes, self.sigma)
        ranks.prepare(model, self._settings_of_run, self._noise.state_dict())
        if self._account is not None:
            self._account.share_name(ranks)

    # ------------------------------------------------------------------ the training loop

    def backward(self, *batch: Any, is_padding: Tensor | None = None) -> Tensor:
        """Add the batch's clipped per-sample gradients to the sums that ``step`` will noise; see ``clipped_sums``.

        Several calls before one ``step`` are one logical batch. One batch of the loader is one step: split it over
        several calls if it is large, but never add up several batches of the loader, never step twice on one, and never
        give one to two optimizers. Sampling rates, and with them epsilon, would be others than those that are accounted
        for; with a plan, such a batch is refused. To accumulate, plan for a larger ``expected_batch_size``.

        Args:
            *batch: What ``loss_fn`` takes after the model: pytrees of tensors, batch axis first. A batch of no
                samples is legal. Or one ``PaddedBatch``, as a loader with ``pad=True`` yields it.
            is_padding: Boolean ``[B]``; samples marked True contribute exactly nothing.

        Returns:
            The mean per-sample loss, detached; NaN for a batch of no samples. Not private.

        Raises:
            ValueError: If the batch is malformed or requires grad, which would end at its edge.
            UnaccountedBatchError: With a plan, if the rows are not those of one batch that a loader of it drew.
            UnclippedGradientError: If a ``.grad`` holds something that was not clipped here, or the parameters to
                train are others than in the logical batch's first call.
            NotPerSampleError: If the loss cannot be attributed to single samples.
        """
        if len(batch) == 1 and isinstance(batch[0], PaddedBatch) and is_padding is None:
            is_padding = batch[0].is_padding
            inside = batch[0].batch
            batch = tuple(inside) if isinstance(inside, tuple | list) else (inside,)
        check_batch(batch)
        trained = self._look_again()
        ranks = self._clipper.ranks
        claim = self._claim
        if self._account is not None:
            claim = self._account.claim(claim, batch, rows_in(batch, is_padding))
        self._pending.before_backward(trained.names, trained.parameters)
        with (
            self._explained_arguments(batch, "backward(*batch)"),
            trained.resident(ranks, self._progress.step) as resident,
        ):
            inputs = self._inputs(resident, batch)
            found = self._clipper.clip(inputs, self._norm(), is_padding, may_alias=True)
        self._pending.add(
            trained.parameters,
            found.sums,
            self._progress.observed(found.outcome),
            aliases_graph=found.aliases_graph,
        )
        self._claim = claim
        self._last = found.outcome
        return found.outcome.mean_loss

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Add noise to the clipped sums, divide by ``expected_batch_size``, step the wrapped optimizer.

        Args:
            closure: Must be None.

        Raises:
            ValueError: If a closure is given.
            PrivacyBudgetError: If all steps of the plan were taken. Nothing was released.
            UnaccountedBatchError: With a plan, if the logical batch is not one whole batch that a loader of it drew.
            UnclippedGradientError: Without a ``backward`` since the last step, or if somebody else wrote to a
                ``.grad`` in between. The parameters are untouched.
        """
        if closure is not None:
            raise ValueError(
                "step: a closure would compute gradients again after the noise was added, unclipped. Call "
                "backward(*batch) and then step(); optimizers that need a closure (LBFGS) cannot be private here."
            )
        account = self._account
        if account is not None and self._pending.unfinished:
            account.check_step(self._claim, self._progress.step)
        sigma, sigma_observed = self.sigma, self._noises()[1]
        names, parameters = self._trained.names, self._trained.parameters
        selected = set(map(id, parameters))
        others = [p for p in self._owned() if id(p) not in selected]
        sums, observed, aliases_graph = self._pending.take(names, parameters, others)
        claim, self._claim = self._claim, Claim()
        ranks = self._clipper.ranks
        ranks.meet("step", self._progress.step, lambda: self._facts_of_step(claim), parameters)
        if account is not None:
            account.record(claim, self.accounted_noise_multiplier)
        with torch.no_grad():
            with phase("noise"):
                share = ranks.share(sums, parameters, is_lent=aliases_graph)
                means = self._noise.next(
                    share.parts,
                    self._progress.step,
                    sigma=sigma,
                    divisor=self.expected_batch_size,
                    in_place=share.private,
                )
                if observed:
                    ranks.one_draw(observed, lambda total: self._noise.count(total, sigma_observed))
            self._pending.publish(parameters, share.gathered(means))
        # Those of a CUDA graph may have no noise: a traceback out of the wrapped optimizer must not hold them.
        del sums, share
        # Before the wrapped optimizer, which may raise: what was noised is public now, and this step is over.
        self._progress = self._progress.advanced(observed, self.expected_batch_size)
        with phase("optimizer"):
            self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the clipped sums of the logical batch, as ``torch.optim.Optimizer.zero_grad`` does."""
        with phase("optimizer"):
            self.inner.zero_grad(set_to_none)
        usual = getattr(self.inner.zero_grad, "__func__", None) is Optimizer.zero_grad
        nothing_left = set_to_none and usual
        self._pending.clear(() if nothing_left else self._owned())
        self._claim = Claim()

    # ------------------------------------------------------------------ what it promises

    @property
    def noise(self) -> NoiseSource:
        """Where noise comes from; another source may be set, if it fits."""
        return self._noise.source

    @noise.setter
    def noise(self, noise: NoiseSource) -> None:
        self._noise = step_noise(noise, self._clipper.arithmetic, self.expected_batch_size)

    @property
    def expected_batch_size(self) -> float:
        """The public constant that sums are divided by."""
        return self._mechanism.expected_batch_size

    @property
    def relation(self) -> Relation:
        """The neighbouring relation that the noise is calibrated to."""
        return self._mechanism.relation

    @property
    def sensitivity(self) -> float:
        """The largest L2 change of the clipped sum between neighbouring datasets; the gradient's, never set."""
        return self._clipper.sensitivity(self._norm(), self.relation)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on the clipped sum, at the present step.

        ``noise_multiplier * sensitivity``; with ``AdaptiveQuantile``, whose count needs noise too, a little more.
        """
        return self._clipper.arithmetic.sigma(self._noises()[0], self.sensitivity)

    @property
    def noise_multiplier(self) -> float:
        """Noise per unit of sensitivity at the present step; set a number or a function of the step."""
        return self._progress.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, noise_multiplier: float | Schedule) -> None:
        if self._account is not None:
            raise ValueError(
                "noise_multiplier belongs to the plan, whose epsilon would not hold any more. Give the plan a function "
                "of the step, or continue with another one: a new DPOptimizer with "
                "plan=another_plan.continuing(optimizer.ledger)."
            )
        self._progress = self._progress.with_noise_multiplier(noise_multiplier)

    @property
    def accounted_noise_multiplier(self) -> float:
        """What the accountant must be told of the present step.

        The step releases what one Gaussian mechanism of this noise multiplier would; for ``AdaptiveQuantile`` that is
        the clipped sum and the count together.
        """
        return self._progress.noise_multiplier

    @property
    def ledger(self) -> Ledger:
        """What was released so far, step by step.

        Raises:
            RuntimeError: Without a plan, since nobody has said how batches are drawn.
        """
        if self._account is None:
            raise RuntimeError(
                "ledger: this optimizer was built without a plan, so it does not know how batches are drawn. Pass "
                "plan=clipgrad.PrivacyPlan(...), or keep a clipgrad.accounting.Ledger yourself."
            )
        return self._account.ledger

    def epsilon(self, delta: float | None = None) -> float:
        """The epsilon of what was released so far.

        Args:
            delta: Probability with which epsilon may fail to hold; default the plan's.

        Raises:
            RuntimeError: Without a plan.
        """
        if delta is None and self._account is not None:
            delta = self._account.plan.delta
        return self.ledger.epsilon(math.nan if delta is None else delta)

    @property
    def max_grad_norm(self) -> ClippingStrategy:
        """The clipping norm at the present step; every norm in it is a number."""
        return owned(self._norm())

    @property
    def clipped_sums(self) -> dict[str, Tensor]:
        """Copies of the clipped sums so far, by parameter name; **not private**, since they have no noise yet.

        Raises:
            UnclippedGradientError: If no ``backward`` waits for its ``step``.
        """
        return dict(zip(self._trained.names, self._pending.sums(), strict=True))

    @property
    def diagnostics(self) -> Diagnostics:
        """Norms, clipped share and dropped samples of the last ``backward``; **not private**.

        Raises:
            RuntimeError: Before the first ``backward``.
        """
        last = self._last
        if last is None:
            raise RuntimeError("diagnostics: no backward has run yet; call backward(*batch) first.")
        return diagnostics_of(last)

    def explain(self, *batch: Any) -> Explanation:
        """Tell how each parameter's per-sample gradient is found for such a batch; changes nothing."""
        check_batch(batch)
        trained = self._look_again()
        with (
            self._explained_arguments(batch, "explain(*batch)"),
            trained.resident(self._clipper.ranks, self._progress.step) as resident,
        ):
            inputs = self._inputs(resident, batch)
            return self._clipper.explain(inputs, self._norm())

    # ------------------------------------------------------------------ torch.optim.Optimizer

    def __getstate__(self) -> dict[str, Any]:
        # ``step`` may be a scheduler's wrapper, bound to this very object. The logical batch in progress stays here.
        left_out = ("step", "_pending", "_claim", "_last", "_trained")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A shallow copy's graphs are bound to its original.
        self._clipper = BatchClipper(self._clipper.options, self._clipper.ranks)
        self._start()

    def __repr__(self) -> str:
        return (
            f"DPOptimizer(max_grad_norm={self.max_grad_norm}, noise_multiplier={self.noise_multiplier}, "
            f"expected_batch_size={self.expected_batch_size}, inner={self.inner!r})"
        )

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, the noise source's, and the step; loadable with ``weights_only=True``.

        An unfinished logical batch is not part of it.
        """
        return {**self.inner.state_dict(), _STATE_KEY: self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        own = {"noise": self._noise.state_dict(), "progress": self._progress.state_dict()}
        if self._account is not None:
            own["account"] = self._account.state_dict()
        return own

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore; a plain optimizer's state dict loads too. An unfinished logical batch is dropped.

        A state that knows no step (a plain optimizer's, or an older one) leaves the step, and the norm of
        ``AdaptiveQuantile``, as they are.

        Raises:
            ValueError: If the state does not fit.
        """
        inner = {key: value for key, value in state_dict.items() if key != _STATE_KEY}
        self._load(state_dict.get(_STATE_KEY), lambda: self.inner.load_state_dict(inner))

    def _load(self, own: Mapping[str, Any] | None, load_inner: Callable[[], None]) -> None:
        progress = self._progress
        if own is not None and "progress" in own:
            progress = progress.restored(own["progress"])
        if self._account is not None:
            self._account.check(own, progress.step)
        load_inner()
        if own is not None:
            self._noise.load_state_dict(own["noise"])
        self._progress = progress
        if own is not None and self._account is not None:
            self._account.load_state_dict(own)
        self._clipper.ranks.compare_soon()
        self.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model to the wrapped optimizer; they are clipped from the next ``backward`` on."""
        given = param_group["params"]
        if not isinstance(given, Tensor | set):
            given = list(given)  # a generator can be read only once
            param_group = {**param_group, "params": given}
        listed = [given] if isinstance(given, Tensor) else given
        added = [p[1] if isinstance(p, tuple) else p for p in listed]
        refuse_foreign_parameters(added, self.model.parameters())
        self.inner.add_param_group(param_group)

    # ------------------------------------------------------------------ inside

    def _inputs(self, resident: Resident, batch: tuple[Any, ...]) -> Inputs:
        names, parameters, holding = resident
        return of_model(self.loss_fn, self.model, names, parameters, holding, batch)

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

    @contextmanager
    def _explained_arguments(self, batch: tuple[Any, ...], call: str) -> Iterator[None]:
        """Say of a batch that does not fit ``loss_fn`` what would."""
        try:
            yield
        except TypeError as error:
            note_arguments(error, self.loss_fn, (self.model, *batch), call)
            raise

    def _norm(self) -> ClippingStrategy:
        return self._progress.max_grad_norm

    def _noises(self) -> tuple[float, float]:
        """The gradients' noise multiplier, and the standard deviation of the noise on what the next norm depends on."""
        return self._progress.noise(self.relation, self.expected_batch_size)

    def _start(self) -> None:
        self._trained = TrainedParameters(self.model, list(self._owned()))
        self._pending = Pending()
        self._claim = Claim()
        self._last = None
        self.inner.register_step_pre_hook(refuse_unnoised(weakref.ref(self._pending)))

    def _owned(self) -> Iterator[Tensor]:
        """Every parameter that the wrapped optimizer steps if it has a gradient."""
        return (p for group in self.inner.param_groups for p in group["params"])

    def _look_again(self) -> TrainedParameters:
        """Find the parameters to train now: the optimizer's, in the model's order, that require grad."""
        owned = list(self._owned())
        before = self._trained
        if before.holds(self.model, owned):
            return before
        trained = TrainedParameters(self.model, owned)
        if self._pending.unfinished and (
            list(map(id, before.parameters)) != list(map(id, trained.parameters))
        ):
            raise UnclippedGradientError(
                "backward: the parameters to train changed within a logical batch (requires_grad, add_param_group), "
                "so the sums so far do not fit. Change them after step() or zero_grad()."
            )
        self._trained = trained
        return trained


def _ranks(options: Options, model: nn.Module) -> Ranks:
    """The processes that train together: those that the user names, or all that there are."""
    group = options.performance.process_group
    if group is None and not initialised():
        return OneProcess()
    from clipgrad.distributed import find_ranks

    ranks = find_ranks(group, model)
    if options.compile_mode is not None and ranks.is_sharded:
        raise ValueError(
            "compile cannot be combined with a model of fully_shard: a compiled step reads parameters where they lay "
            "when it was compiled, and FSDP gathers them anew for each batch. Leave compile out."
        )
    if ranks.size > 1 and options.grid is not None:
        raise ValueError(
            f"exact mode (grid={options.grid}) proves the sums of one process, but {ranks.size} train together. Leave "
            "the grid out, or train in one process."
        )
    return ranks
