"""One run of a plan: what its loaders handed out, and what its optimizers released."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from clipgrad.accounting import Ledger
from clipgrad.plan.receipts import Receipts


@dataclass(eq=False)
class Run:
    """The state of a plan that is carried out; every loader and optimizer of the plan shares it.

    A copy in the same process is the same run: a copied optimizer spends the same budget.

    Attributes:
        name: Marks the run's steps in a ledger.
        ledger: What the steps are written to; None before an optimizer was built, unless it continues an earlier one.
        carried_out: Whether an optimizer was built.
        receipts: The batches that were handed out, and those that were stepped on.
        iteration: Of the loader, which the last step was taken in.
    """

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    ledger: Ledger | None = None
    carried_out: bool = False
    receipts: Receipts = field(default_factory=Receipts)
    iteration: int = 0

    def __copy__(self) -> Run:
        return self

    def __deepcopy__(self, memo: object) -> Run:
        return self
