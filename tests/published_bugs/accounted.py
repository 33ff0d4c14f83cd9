"""Bugs of sampling, accounting and restarts; see ``bugs``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad import PrivacyPlan, SeededNoise, SystemNoise
from clipgrad.accounting import Ledger, Poisson, _ledger
from clipgrad.plan.account import Account
from clipgrad.sampling._trials import Trials
from tests.published_bugs import checks
from tests.published_bugs.bugs import bug


@bug(
    "the accountant is told of another sampling rate",
    "Opacus #813 (2026), #335 (2022)",
    checks.what_is_accounted_is_what_was_done,
)
def _(patch: pytest.MonkeyPatch) -> None:
    """One over the length of the loader, as when the sampler decides how long that is."""
    patch.setattr(PrivacyPlan, "sampling", property(lambda self: Poisson(1 / self.steps)))


@bug(
    "the accountant is told of another sigma",
    "jax_privacy #383 (2026)",
    checks.what_is_accounted_is_what_was_done,
)
def _(patch: pytest.MonkeyPatch) -> None:
    right = Account.record
    patch.setattr(Account, "record", lambda self, claim, noise: right(self, claim, noise * 64))


@bug(
    "changes of the noise are counted, not steps",
    "Opacus #829 (2026)",
    checks.the_ledger_counts_every_step,
)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "steps", property(lambda self: len(self.history)))


@bug("epsilon comes out negative", "Opacus #585 (2023)", checks.epsilon_is_never_negative)
def _(patch: pytest.MonkeyPatch) -> None:
    right = _ledger.epsilon_of
    patch.setattr(_ledger, "epsilon_of", lambda *rest: right(*rest) - 1e-3)
    patch.setattr(_ledger, "max", lambda *both: both[0], raising=False)


@bug(
    "uniforms of 24 bits decide over small rates",
    "any sampler on torch.rand in float32",
    checks.small_rates_are_exact,
)
def _(patch: pytest.MonkeyPatch) -> None:
    """``rand() < q`` with float32 uniforms, which are multiples of 2^-24, succeeds as often as this rate says."""
    right = Trials.of_rate
    patch.setattr(Trials, "of_rate", lambda rate: right(math.ceil(rate * 2**24) / 2**24))


@bug(
    "a restored run draws the noise of the killed one again",
    "a generator's state in the checkpoint",
    checks.nothing_repeats_after_a_restart,
)
def _(patch: pytest.MonkeyPatch) -> None:
    def state_dict(self: SystemNoise) -> dict[str, Any]:
        return {"calls": getattr(self, "calls", 0)}

    def load_state_dict(self: SystemNoise, state: dict[str, Any]) -> None:
        self.calls = state["calls"]  # type: ignore[attr-defined]

    def add(self: SystemNoise, tensors: list[Tensor], sigma: float) -> None:
        self.calls = getattr(self, "calls", 0) + 1  # type: ignore[attr-defined]
        SeededNoise(torch.Generator().manual_seed(self.calls)).add_gaussian_(tensors, sigma)

    patch.setattr(SystemNoise, "state_dict", state_dict)
    patch.setattr(SystemNoise, "load_state_dict", load_state_dict)
    patch.setattr(SystemNoise, "add_gaussian_", add)
