"""What an optimizer that was built from a plan has released so far, and whether it may go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipgrad.accounting import Ledger
from clipgrad.errors import PrivacyBudgetError
from clipgrad.plan import PrivacyPlan


class Account:
    """A plan, the steps that were taken of it, and the ledger that they are written to.

    Args:
        plan: What is being carried out.
        ledger: Of an earlier training on the same data, to be continued; by default an empty one.

    Raises:
        ValueError: If ledger and plan do not count alike.
    """

    def __init__(self, plan: PrivacyPlan, ledger: Ledger | None = None) -> None:
        self.plan = plan
        self.done = 0
        if ledger is None:
            ledger = Ledger(relation=plan.relation, accountant=plan.accountant)
        elif not isinstance(ledger, Ledger):
            raise ValueError(
                f"ledger must be a clipgrad.accounting.Ledger, got {type(ledger).__name__}; optimizer.ledger of the "
                "earlier training, for example."
            )
        found, wanted = (ledger.relation, ledger.accountant), (plan.relation.value, plan.accountant)
        if found != wanted:
            raise ValueError(
                f"ledger counts with relation and accountant {found}, the plan with {wanted}: their epsilons do not "
                "add up. Make the plan with those of the ledger."
            )
        self.ledger = ledger
        self.ledger.begin()

    def before_step(self) -> None:
        """Refuse a step that was not planned.

        Raises:
            PrivacyBudgetError: If all planned steps were taken.
        """
        if self.done >= self.plan.steps:
            raise PrivacyBudgetError(
                f"step: all {self.plan.steps} steps of the plan were taken, and a further one would cost more than "
                f"it promises at delta = {self.plan.delta}. One iteration of a loader made with plan= is the whole "
                "run. End the training, or plan for more steps: a new DPOptimizer with another plan and "
                "ledger=optimizer.ledger continues the count."
            )

    def record(self, noise_multiplier: float) -> None:
        """Write down a step, before anything of it can be seen."""
        self.ledger.record(noise_multiplier, self.plan.sampling)
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "ledger": self.ledger.state_dict()}

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Refuse a state that ``load_state_dict`` could not take up; changes nothing.

        Args:
            state: What the optimizer saved beside the wrapped optimizer's state, ``account`` among it.

        Raises:
            ValueError: If there is no account in it, it does not fit, or it would forget steps.
        """
        if state is None or "account" not in state:
            raise ValueError(
                "state_dict has no account of what was released, but the optimizer was built with a plan: steps would "
                "be forgotten. Load the state of an optimizer with a plan, or the wrapped one's into optimizer.inner."
            )
        found = state["account"]
        done = found["done"]
        if type(done) is not int or done < 0:
            raise ValueError(f"state_dict: done must be a number of steps, got {done!r}.")
        saved = Ledger(relation=self.plan.relation, accountant=self.plan.accountant)
        saved.load_state_dict(found["ledger"])
        if saved.steps < self.ledger.steps:
            raise ValueError(
                f"state_dict holds {saved.steps} released steps, the ledger {self.ledger.steps}: what was released in "
                "this process stays released. To return to earlier weights load the model's state alone; to resume "
                "after a restart build a new DPOptimizer."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the count of a checkpoint that was checked, in the ledger that others may hold too."""
        self.ledger.load_state_dict(state["account"]["ledger"])
        self.ledger.begin()
        self.done = state["account"]["done"]


def account_of(plan: PrivacyPlan | None, ledger: Ledger | None) -> Account | None:
    """The account of a plan, if there is one.

    Raises:
        ValueError: If a ledger is given without a plan.
    """
    if plan is None:
        if ledger is not None:
            raise ValueError(
                "ledger needs a plan, which says how batches are drawn; pass plan=clipgrad.PrivacyPlan(...)."
            )
        return None
    return Account(plan, ledger)
