"""What the optimizers that were built from a plan have released so far, and whether they may go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipgrad.accounting import Ledger
from clipgrad.errors import PrivacyBudgetError
from clipgrad.plan import PrivacyPlan
from clipgrad.plan.receipts import Claim


class Account:
    """A plan, and the ledger that its steps are written to. All optimizers of one plan share ledger and budget.

    Args:
        plan: What is being carried out.
        noise: How the noise of a step is to be accounted for: ``StepNoise.accounting``.

    Raises:
        ValueError: If the plan accounts for another kind of noise.
    """

    def __init__(self, plan: PrivacyPlan, noise: str) -> None:
        if noise != plan.noise_accounting:
            raise ValueError(
                f"the plan accounts for {plan.noise_accounting} noise, but the optimizer would draw {noise} "
                "noise. Make a plan for it."
            )
        self.plan = plan
        run = plan.run
        if not run.carried_out:
            if run.ledger is None:
                run.ledger = Ledger(relation=plan.relation, accountant=plan.accountant)
            run.ledger.begin()
            run.carried_out = True

    @property
    def ledger(self) -> Ledger:
        """What was released, by all optimizers of the plan, and before."""
        ledger = self.plan.run.ledger
        assert ledger is not None
        return ledger

    @property
    def done(self) -> int:
        """Steps of the plan that were taken, by all of its optimizers."""
        return self.ledger.steps_of(self.plan.run.name)

    def claim(self, claim: Claim, batch: Any, rows: int) -> Claim:
        """Add the rows of one ``backward`` to what the logical batch has claimed.

        Raises:
            UnaccountedBatchError: If they are not of one batch that a loader of the plan drew.
        """
        if self.plan.declared_sampling is not None:
            return Claim(None, claim.rows + rows)
        return self.plan.run.receipts.claim(claim, batch, rows)

    def check_step(self, claim: Claim, step: int) -> None:
        """Refuse a step that was not planned; changes nothing.

        Args:
            claim: Of the logical batch.
            step: How many steps the optimizer itself has taken.

        Raises:
            PrivacyBudgetError: If all planned steps were taken, or the plan's schedule is at another step.
            UnaccountedBatchError: If the logical batch is not one whole batch that a loader of the plan drew.
        """
        if self.done >= self.plan.steps:
            raise PrivacyBudgetError(
                f"step: all {self.plan.steps} steps of the plan were taken, and a further one would cost more than "
                f"it promises at delta = {self.plan.delta}. One iteration of a loader made with plan= is the whole "
                "run. End the training, or plan for more steps: a new DPOptimizer with "
                "plan=another_plan.continuing(optimizer.ledger) continues the count."
            )
        if callable(self.plan.noise_multiplier) and self.done != step:
            raise PrivacyBudgetError(
                f"step: the plan's noise is a function of the step, and {self.done} steps of the plan were taken, "
                f"{step} of them by this optimizer: it would repeat the noise of step {step}. Let one optimizer carry "
                "out a plan with a schedule."
            )
        if self.plan.declared_sampling is None:
            self.plan.run.receipts.to_spend(claim)

    def record(self, claim: Claim, noise_multiplier: float) -> None:
        """Write down a step that was checked, before anything of it can be seen."""
        run = self.plan.run
        if self.plan.declared_sampling is None:
            receipt = run.receipts.to_spend(claim)
            run.receipts.spend(receipt)
            if receipt.iteration != run.iteration:
                self.ledger.begin()  # another iteration shuffles anew
                run.iteration = receipt.iteration
        self.ledger.record(
            noise_multiplier,
            self.plan.sampling,
            run=run.name,
            declared=self.plan.declared_sampling or "",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.plan.run.name, "ledger": self.ledger.state_dict()}

    def check(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Refuse a state that ``load_state_dict`` could not take up; changes nothing.

        Args:
            state: What the optimizer saved beside the wrapped optimizer's state, ``account`` among it.
            step: Steps that the optimizer itself has taken, by the same state.

        Raises:
            ValueError: If there is no account in it, it does not fit, or it would forget steps.
        """
        if state is None or "account" not in state:
            raise ValueError(
                "state_dict has no account of what was released, but the optimizer was built with a plan: steps would "
                "be forgotten. Load the state of an optimizer with a plan, or the wrapped one's into optimizer.inner."
            )
        found = state["account"]
        whole = isinstance(found, Mapping) and found.keys() == {"run", "ledger"}
        if not (whole and isinstance(found["run"], str) and isinstance(found["ledger"], Mapping)):
            raise ValueError(
                f"state_dict: the account must hold 'run' and 'ledger', got {found!r}; load what "
                "DPOptimizer.state_dict() returned."
            )
        if self.done and found["run"] != self.plan.run.name:
            raise ValueError(
                f"state_dict is of another run, but {self.done} steps of this plan were taken in this process, which "
                "would not count any more. Load it into an optimizer of a new plan: dataclasses.replace(plan)."
            )
        done = self.ledger.read(found["ledger"]).steps_of(found["run"])
        if done < step:
            raise ValueError(
                f"state_dict: the optimizer has taken {step} steps, but the ledger holds {done} of this run. The state "
                "was edited, or put together from two; load it as it was saved."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the count of a checkpoint that was checked, in the ledger that others may hold too."""
        self.ledger.load_state_dict(state["account"]["ledger"])
        self.ledger.begin()
        self.plan.run.name = state["account"]["run"]
