"""Record what the optimizers of a plan have released, and refuse steps beyond the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clipgrad.accounting import Ledger
from clipgrad.errors import PrivacyBudgetError, UnaccountedBatchError
from clipgrad.plan import PrivacyPlan
from clipgrad.plan.receipts import Claim, Receipt, rows_in
from clipgrad.ranks import Ranks


class Account:
    """This class connects a plan with the ledger of its steps. All optimizers of one plan share ledger and budget.

    ``noise`` is the accounting that the noise of a step needs, ``StepNoise.accounting``, and must be the plan's.
    """

    def __init__(self, plan: PrivacyPlan, noise: str) -> None:
        if noise != plan.noise_accounting:
            raise ValueError(
                f"the plan accounts for {plan.noise_accounting} noise, but the optimizer would add {noise} "
                "noise. Make a plan for it."
            )
        self.plan = plan
        run = plan.run
        if not run.has_optimizer:
            if run.ledger is None:
                run.ledger = Ledger(relation=plan.relation, accountant=plan.accountant)
            run.ledger.begin()
            run.has_optimizer = True

    @property
    def ledger(self) -> Ledger:
        """Return the ledger of all steps by optimizers of the plan, and of earlier runs that the plan continues."""
        ledger = self.plan.run.ledger
        assert ledger is not None
        return ledger

    @property
    def steps_done(self) -> int:
        """Return the number of steps that all optimizers of the plan have taken."""
        return self.ledger.steps_of(self.plan.run.name)

    def claim(self, claim: Claim, batch: Any, is_padding: Any) -> Claim:
        """Add the rows of one ``backward`` that are no padding to the claim of the logical batch."""
        rows = rows_in(batch, is_padding)
        if self.plan.declared_sampling is not None:
            return Claim(None, claim.rows + rows)
        return self.plan.run.receipts.claim(claim, batch, rows)

    def handed_out(self) -> list[Tensor]:
        """Return the tensors of batches that the plan's loaders made and the loop still holds."""
        return self.plan.run.receipts.tensors()

    def check_step(self, claim: Claim, step: int) -> None:
        """Refuse a step that is not planned; this changes no state. ``step`` counts the optimizer's own steps."""
        if self.steps_done >= self.plan.steps:
            raise PrivacyBudgetError(
                f"step: all {self.plan.steps} steps of the plan were taken, and a further one would cost more than "
                f"it promises at delta = {self.plan.delta}. One iteration of a loader made with plan= is the whole "
                "run. End the training, or plan for more steps: a new DPOptimizer with "
                "plan=another_plan.continuing(optimizer.ledger) continues the count."
            )
        if callable(self.plan.noise_multiplier) and self.steps_done != step:
            raise PrivacyBudgetError(
                f"step: the plan's noise is a function of the step. {self.steps_done} steps of the plan were taken, "
                f"{step} of them by this optimizer, so it would repeat the noise of step {step}. Let one optimizer "
                "take all steps of a plan with a schedule."
            )
        if self.plan.mechanism is not None and self.steps_done != step:
            raise PrivacyBudgetError(
                f"step: the plan's noise is correlated over steps, and {self.steps_done} steps of the plan were taken, "
                f"{step} of them by this optimizer, which does not know the noise of the others. Let one optimizer "
                "carry out such a plan."
            )
        if self.plan.declared_sampling is None:
            receipt = self.plan.run.receipts.receipt_to_spend(claim)
            if self.plan.mechanism is not None:
                self._check_turn(receipt)

    def _check_turn(self, receipt: Receipt) -> None:
        """Refuse a batch in which samples take part out of turn: correlated noise does not account for it."""
        remedy = (
            "Correlated noise is accounted for if each sample keeps its turn for the whole run. Use one iteration of "
            "one loader, and after a restart load its state together with the optimizer's."
        )
        run = self.plan.run
        if receipt.index != self.steps_done:
            raise UnaccountedBatchError(
                f"step {self.steps_done}: batch {receipt.index} of the loader is of another step. {remedy}"
            )
        if self.steps_done and run.turns != run.receipts.turns:
            raise UnaccountedBatchError(
                f"step {self.steps_done}: the loader has drawn anew which samples take turns. {remedy}"
            )

    def share_name(self, ranks: Ranks) -> None:
        """Let the steps of a new run have one name in the ledgers of all processes."""
        run = self.plan.run
        name = ranks.value_of_first(run.name)
        if self.steps_done == 0:
            run.name = name

    def position(self, claim: Claim, ranks: Ranks) -> tuple[str, int, int, int]:
        """Return the run, the number of its steps, and the batch that a step would use; the same in each process."""
        run = self.plan.run
        if self.plan.declared_sampling is not None:
            return run.name, self.steps_done, 0, 0
        receipt = run.receipts.receipt_to_spend(claim)
        run.receipts.check_share(ranks.rank, ranks.size)
        return run.name, self.steps_done, receipt.iteration, receipt.index

    def record(self, claim: Claim, noise_multiplier: float) -> None:
        """Record a step that ``check_step`` has accepted; call this before the step's result becomes visible."""
        run = self.plan.run
        if self.plan.declared_sampling is None:
            receipt = run.receipts.receipt_to_spend(claim)
            run.receipts.spend(receipt)
            run.turns = run.receipts.turns
            if receipt.iteration != run.iteration:
                self.ledger.begin()  # each iteration shuffles anew
                run.iteration = receipt.iteration
        self.ledger.record(
            noise_multiplier,
            self.plan.sampling,
            run=run.name,
            declared=self.plan.declared_sampling or "",
        )

    def state_dict(self) -> dict[str, Any]:
        state = {"run": self.plan.run.name, "ledger": self.ledger.state_dict()}
        return {**state, "turns": self.plan.run.turns} if self.plan.mechanism is not None else state

    def check(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Refuse a state that ``load_state_dict`` cannot load, or that would forget steps; this changes no state.

        ``step`` is the number of steps that the optimizer itself has taken according to the same state.
        """
        if state is None or "account" not in state:
            raise ValueError(
                "state_dict has no account of what was released, but the optimizer was built with a plan: steps would "
                "be forgotten. Load the state of an optimizer with a plan, or the wrapped one's into optimizer.inner."
            )
        found = state["account"]
        wanted = {"run", "ledger"} | ({"turns"} if self.plan.mechanism is not None else set())
        whole = isinstance(found, Mapping) and found.keys() == wanted
        if not (whole and isinstance(found["run"], str) and isinstance(found["ledger"], Mapping)):
            raise ValueError(
                f"state_dict: the account must hold 'run' and 'ledger', got {found!r}; load what "
                "DPOptimizer.state_dict() returned."
            )
        if self.steps_done and found["run"] != self.plan.run.name:
            raise ValueError(
                f"state_dict is of another run, but {self.steps_done} steps of this plan were taken in this process. "
                "Loading it would forget them. Load it into an optimizer of a new plan: dataclasses.replace(plan)."
            )
        recorded = self.ledger.read(found["ledger"]).steps_of(found["run"])
        if recorded < step:
            raise ValueError(
                f"state_dict: the optimizer has taken {step} steps, but the ledger holds {recorded} of this run. The "
                "state was edited, or combined from two states; load it as it was saved."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that ``check`` has accepted into the ledger object that other optimizers may share."""
        self.ledger.load_state_dict(state["account"]["ledger"])
        self.ledger.begin()
        self.plan.run.name = state["account"]["run"]
        self.plan.run.turns = str(state["account"].get("turns", ""))
