"""This module holds the part of ``DPOptimizer`` that belongs to the logical batch between two steps."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipgrad._phases import phase
from clipgrad.batch import BatchClipper
from clipgrad.optimizer.numbers_of_rows import NumbersOfRows
from clipgrad.optimizer.parameters import TrainedParameters
from clipgrad.optimizer.pending import Pending, unnoised_step_hook
from clipgrad.optimizer.privacy_state import PrivacyState
from clipgrad.optimizer.requirements import holds_compiled_code, is_compiled
from clipgrad.plan.receipts import Claim
from clipgrad.result import Diagnostics, Outcome, diagnostics_of

_log = logging.getLogger("clipgrad")


class LogicalBatch(PrivacyState):
    """This class holds what ``backward`` leaves for ``step``: trained parameters, their sums, and the used receipts."""

    model: nn.Module
    loss_fn: Callable[..., Any]
    _trained: TrainedParameters
    _pending: Pending
    _claim: Claim
    _numbers: NumbersOfRows
    _last_outcome: Outcome | None
    _may_be_trivial: bool
    _loss_by_name: tuple[Callable[..., Any], Callable[..., Any]] | None

    def _start_batch(self) -> None:
        self._trained = TrainedParameters(self.model, list(self._owned_parameters()))
        self._pending = Pending()
        self._claim = Claim()
        if is_compiled(self.loss_fn) or holds_compiled_code(self.model):
            self._clipper.use_graph_of_loss()
        self._numbers = NumbersOfRows()
        self._last_outcome = None
        self._may_be_trivial = True
        self._loss_by_name = None
        self.inner.register_step_pre_hook(unnoised_step_hook(weakref.ref(self._pending)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the clipped sums of the logical batch, as ``torch.optim.Optimizer.zero_grad`` discards gradients."""
        with phase("optimizer"):
            self.inner.zero_grad(set_to_none)
        usual = getattr(self.inner.zero_grad, "__func__", None) is Optimizer.zero_grad
        nothing_left = set_to_none and usual
        self._pending.clear(() if nothing_left else self._owned_parameters())
        self._claim = Claim()

    @property
    def clipped_sums(self) -> dict[str, Tensor]:
        """Return copies of the clipped sums by parameter name; **not private**, since they have no noise yet.

        Raises:
            UnclippedGradientError: If there was no ``backward`` since the last ``step``.
        """
        return dict(zip(self._trained.names, self._pending.sums(), strict=True))

    @property
    def diagnostics(self) -> Diagnostics:
        """Return norms, clipped share and dropped samples of the last ``backward``; **not private**.

        Raises:
            RuntimeError: Before the first ``backward``.
        """
        last = self._last_outcome
        if last is None:
            raise RuntimeError("diagnostics: no backward has run yet; call backward(*batch) first.")
        return diagnostics_of(last)

    def _keep(self, outcome: Outcome) -> None:
        """Keep the outcome of a batch for ``diagnostics``, and warn if no sample of the first one contributes.

        A loss that compares samples of a batch is constant or NaN for a batch of one. Nothing else would show that,
        because noise moves the parameters all the same. Only one batch is read, since reading waits for the device.
        """
        self._last_outcome = outcome
        if self._may_be_trivial and outcome.batch_size > 1:
            self._may_be_trivial = False
            contributes = torch.stack(list(outcome.norms)).any(0) & ~outcome.nonfinite
            if not bool(contributes.any()):
                _log.warning(
                    "clipgrad: the gradients of all %d samples of the first batch are zero or not finite, so a step "
                    "would follow the noise alone. The loss sees one sample at a time. What compares samples of a "
                    "batch (in-batch negatives, x - x.mean(0), x.std(0)) is trivial there: put the partners of a "
                    "sample into the sample.",
                    outcome.batch_size,
                )

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        # ``step`` may be a scheduler's wrapper that is bound to this object. An unfinished logical batch is not copied.
        left_out = (
            "step", "_pending", "_claim", "_numbers", "_last_outcome", "_trained", "_loss_by_name"
        )  # fmt: skip
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A shallow copy must not share compiled graphs with its original.
        self._clipper = BatchClipper(self._clipper.options, self._clipper.ranks)
        self._start_batch()

    # ------------------------------------------------------------------ parameters

    def _owned_parameters(self) -> Iterator[Tensor]:
        """Yield all parameters of the wrapped optimizer."""
        return (p for group in self.inner.param_groups for p in group["params"])

    def _find_trained_parameters(self) -> TrainedParameters:
        """Return the optimizer's parameters that require grad, in the model's order."""
        self._clipper.ranks.release(self.model)
        trained = self._trained.refreshed(self.model, list(self._owned_parameters()))
        self._pending.check_same_parameters(self._trained.parameters, trained.parameters)
        self._trained = trained
        return trained
