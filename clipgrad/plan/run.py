"""This file holds ``Run``: which batches the loaders of a plan handed out, and what its optimizers released."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from clipgrad.accounting import Ledger
from clipgrad.plan.receipts import Receipts


@dataclass(eq=False)
class Run:
    """This class holds the state of a plan's run; every loader and optimizer of the plan shares it.

    A copy in the same process is the same run, since a copied optimizer spends the same budget.
    """

    # The name of the run's steps in a ledger
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    # The ledger of the steps; None before the first optimizer is built, unless the plan continues a ledger
    ledger: Ledger | None = None
    has_optimizer: bool = False  # Whether an optimizer was built
    receipts: Receipts = field(default_factory=Receipts)  # The receipts of the run
    iteration: int = 0  # The loader's iteration in which the last step was taken
    turns: str = ""  # Which sample has its turn when; empty before the first step

    def __copy__(self) -> Run:
        return self

    def __deepcopy__(self, memo: object) -> Run:
        return self
