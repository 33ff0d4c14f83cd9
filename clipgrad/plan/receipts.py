"""Which batches the loaders of a plan handed out, and on which of them a step was taken.

A sampling rate holds for one batch at a time: two batches added up, one batch stepped on twice, or rows that nobody
drew have another. So each batch that a loader hands out gets a receipt, and each step spends one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from clipgrad.errors import UnaccountedBatchError


@dataclass(frozen=True)
class Receipt:
    """One batch that a loader handed out.

    Attributes:
        iteration: Counts the iterations of all loaders of the plan.
        index: Position in its iteration, from 0.
        rows: Samples (or users) that were drawn; padding is not among them.
    """

    iteration: int
    index: int
    rows: int


class Claim(NamedTuple):
    """What one logical batch has taken of the batches that were handed out.

    Attributes:
        receipt: Of the batch that its tensors are known to belong to; None if the loop made new ones of them.
        rows: Rows so far, padding not counted.
    """

    receipt: Receipt | None = None
    rows: int = 0


class Receipts:
    """The receipts of one run of a plan, shared by its loaders and optimizers.

    A batch is known by its tensors, also unpacked and in another container. If the loop made new tensors of them
    (``x.to(device)``), rows are counted: they must be as many as in a batch that was handed out after the last one
    that was stepped on.

    Args:
        without_gaps: Whether batches must be stepped on in their order, and none be left out. If a shuffled batch is
            left out, the following ones reach into another pass.
    """

    def __init__(self, *, without_gaps: bool = False) -> None:
        self._without_gaps = without_gaps
        self._iteration = 0
        self._unspent: dict[int, Receipt] = {}
        self._last_spent = -1
        # id(tensor) -> the tensor, while it lives, and its batch.
        self._known: dict[int, tuple[weakref.ref[Tensor], Receipt | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a receipt is worth something in the process in which its batch was drawn."""
        return vars(Receipts(without_gaps=self._without_gaps))

    def __copy__(self) -> Receipts:
        return self

    def __deepcopy__(self, memo: object) -> Receipts:
        return self

    def begin_iteration(self) -> int:
        """A loader starts anew: what is left of its last iteration is worth nothing any more."""
        self._iteration += 1
        self._unspent.clear()
        self._last_spent = -1
        return self._iteration

    def hand_out(self, iteration: int, index: int, rows: int, batch: Any) -> None:
        """Write a receipt for a batch that the training loop receives now.

        Args:
            iteration: What ``begin_iteration`` returned.
            index: Position of the batch in it.
            rows: Samples that were drawn.
            batch: As the loop receives it.
        """
        if iteration != self._iteration:
            return  # an older iterator that somebody still holds
        receipt = self._unspent[index] = Receipt(iteration, index, rows)
        for leaf in _tensors(batch):
            key = id(leaf)
            # A collate function may put one tensor into several batches; then it tells nothing.
            alone = None if self._is_known(leaf) else receipt
            self._known[key] = (weakref.ref(leaf, partial(self._forget, key)), alone)

    def claim(self, claim: Claim, batch: Any, rows: int) -> Claim:
        """Add the rows of one ``backward`` to what a logical batch has claimed.

        Args:
            claim: Of the logical batch so far.
            batch: The batch, in any container.
            rows: Its rows without padding.

        Raises:
            UnaccountedBatchError: If they cannot be of one batch that was handed out and not stepped on yet.
        """
        found = {known for leaf in _tensors(batch) if (known := self._of(leaf)) is not None}
        if claim.receipt is not None:
            found.add(claim.receipt)
        if len(found) > 1:
            raise UnaccountedBatchError(_SEVERAL.format(numbers=_numbers(found)))
        total = claim.rows + rows
        if not found:
            if not any(receipt.rows >= total for receipt in self._in_order()):
                raise UnaccountedBatchError(self._unknown(total))
            return Claim(None, total)
        (receipt,) = found
        if not self._is_unspent(receipt):
            raise UnaccountedBatchError(_SPENT.format(number=receipt.index))
        if total > receipt.rows:
            raise UnaccountedBatchError(
                f"backward: {total} rows of batch {receipt.index} of the loader, which drew {receipt.rows}. "
                + _ONE_STEP
            )
        return Claim(receipt, total)

    def to_spend(self, claim: Claim) -> Receipt:
        """The receipt that a step on a logical batch would spend; spends nothing yet.

        Raises:
            UnaccountedBatchError: If the logical batch is not all of one batch, if a step was taken on it, or if a
                batch before it was left out that must not be.
        """
        receipt = claim.receipt
        if receipt is None:
            fitting = [receipt for receipt in self._in_order() if receipt.rows == claim.rows]
            if not fitting:
                raise UnaccountedBatchError(self._unknown(claim.rows))
            receipt = fitting[0]
        elif not self._is_unspent(receipt):
            raise UnaccountedBatchError(_SPENT.format(number=receipt.index))
        if claim.rows != receipt.rows:
            raise UnaccountedBatchError(
                f"step: the logical batch holds {claim.rows} of the {receipt.rows} rows of batch {receipt.index} of "
                "the loader. Give all of them to backward, in one call or several; rows left out depend on the data."
            )
        self._refuse_left_out(receipt)
        return receipt

    def spend(self, receipt: Receipt) -> None:
        """A step was taken on a batch."""
        del self._unspent[receipt.index]
        self._last_spent = max(self._last_spent, receipt.index)

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor

    def _of(self, tensor: Tensor) -> Receipt | None:
        return self._known[id(tensor)][1] if self._is_known(tensor) else None

    def _forget(self, key: int, _: object) -> None:
        known = self._known.get(key)
        if known is not None and known[0]() is None:
            del self._known[key]

    def _is_unspent(self, receipt: Receipt) -> bool:
        return self._unspent.get(receipt.index) is receipt

    def _in_order(self) -> list[Receipt]:
        """Batches that were handed out after the last one that was stepped on, oldest first."""
        return [receipt for index, receipt in self._unspent.items() if index > self._last_spent]

    def _refuse_left_out(self, receipt: Receipt) -> None:
        """An empty batch would be left out because it was empty; a shuffled one changes how many passes there are."""
        for index, other in self._unspent.items():
            if index < receipt.index and other.rows == 0:
                raise UnaccountedBatchError(
                    f"step: batch {index} of the loader was empty, and no step was taken on it. Leaving it out tells "
                    "that it was empty. Call backward and step for empty batches too; they get their noise."
                )
            if index < receipt.index and self._without_gaps:
                raise UnaccountedBatchError(
                    f"step: batch {index} of the shuffled loader was left out, or comes later. Then the steps reach "
                    "into further passes, and a sample takes part more often than is accounted for. Step on every "
                    "batch, in the loader's order."
                )

    def _unknown(self, rows: int) -> str:
        waiting = self._in_order()
        if not waiting:
            return (
                f"backward: a batch of {rows} rows that no loader of this plan drew for this step, or on which a step "
                "was taken already. " + _SOURCES
            )
        return (
            f"a logical batch of {rows} rows, but the loader of this plan drew {_sizes(waiting)}. "
            + _ONE_STEP
        )


_ONE_STEP = (
    "One batch of the loader is one step: split it over several backward calls if it is large, but do not add up "
    "batches; for larger ones, plan a larger expected_batch_size. The sample axis must come first. A loader of the "
    "plan that begins another iteration ends the last one."
)
_SOURCES = (
    "Under a plan, what is stepped on must be what the plan accounts for. Draw batches with "
    "clipgrad.poisson_loader(dataset, plan=plan), user_loader or shuffled_loader, and with the optimizer's own plan "
    "object. Or say how you draw them: PrivacyPlan(declared_sampling='...')."
)
_SEVERAL = (
    "backward: rows of several batches of the loader, numbers {numbers}, in one step. " + _ONE_STEP
)
_SPENT = (
    "batch {number} of the loader was stepped on already, or its iteration has ended: a second step would cost privacy "
    "that is not accounted for. Take each batch from the loader once, for one optimizer. One DPOptimizer can wrap "
    "several inner optimizers (docs/sampling.md)."
)


def _tensors(batch: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):  # no pytree: Hugging Face's BatchEncoding, for example
            yield from _tensors(dict(leaf))


def _numbers(receipts: Iterable[Receipt]) -> str:
    return " and ".join(str(index) for index in sorted(receipt.index for receipt in receipts))


def _sizes(receipts: list[Receipt]) -> str:
    sizes = ", ".join(str(receipt.rows) for receipt in receipts[:3])
    return f"{sizes}{', ...' if len(receipts) > 3 else ''} rows"
