"""Record which batches the loaders of a plan have handed out, and which of them were used in a step.

The plan's sampling rate holds for one batch per step. It does not hold for the sum of two batches, for a batch that is
used in two steps, or for other rows. So each batch that a loader hands out gets a receipt, and each step spends one.
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
    """A receipt stands for one batch that a loader handed out."""

    iteration: int  # Number of the iteration, counted over all loaders of the plan
    index: int  # Position in its iteration, from 0
    rows: int  # Number of samples (or users) in the batch, without padding


class Claim(NamedTuple):
    """A claim says which rows of the handed-out batches a logical batch has used so far."""

    # The receipt of the batch that its tensors belong to; None if the loop made new tensors
    receipt: Receipt | None = None
    rows: int = 0  # Number of rows so far, without padding


class Receipts:
    """This class holds the receipts of one run of a plan; the plan's loaders and optimizers share it.

    A batch is identified by its tensors, also if they are unpacked or in another container. If the loop made new
    tensors (``x.to(device)``), rows are counted instead: a batch with that number of rows must have been handed out
    after the last batch that was used in a step.
    If ``without_gaps`` names the loader, steps must use all its batches in their order: if a shuffled or a cyclic batch
    is left out, samples take part sooner again than is accounted for.
    """

    def __init__(self, *, without_gaps: str = "") -> None:
        self._without_gaps = without_gaps
        self._iteration = 0
        self.turns = ""
        """Names which sample has its turn when, in the batches of this iteration; empty if none has."""
        self._unspent: dict[int, Receipt] = {}
        self._last_spent = -1
        self._share = (0, 1)
        # id(tensor) -> the tensor, while it is alive, and its batch.
        self._known: dict[int, tuple[weakref.ref[Tensor], Receipt | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without receipts, which are valid only in the process in which the batch was sampled."""
        return vars(Receipts(without_gaps=self._without_gaps))

    def __copy__(self) -> Receipts:
        return self

    def __deepcopy__(self, memo: object) -> Receipts:
        return self

    def begin_iteration(self, share: tuple[int, int] = (0, 1), turns: str = "") -> int:
        """Begin an iteration of a loader of one part of the data, and invalidate the last one's unspent receipts.

        ``turns`` names which sample has its turn when; it is empty if samples take no turns.
        """
        self._share = share
        self._iteration += 1
        self.turns = turns
        self._unspent.clear()
        self._last_spent = -1
        return self._iteration

    def hand_out(self, iteration: int, index: int, rows: int, batch: Any) -> None:
        """Write a receipt for a batch that the training loop is about to receive.

        ``iteration`` is the return value of ``begin_iteration``, and ``rows`` does not count padding.
        """
        if iteration != self._iteration:
            return  # the batch comes from an iterator of an earlier iteration
        receipt = self._unspent[index] = Receipt(iteration, index, rows)
        for leaf in _tensors(batch):
            key = id(leaf)
            # A collate function may put one tensor into several batches; such a tensor identifies none of them.
            alone = None if self._is_known(leaf) else receipt
            self._known[key] = (weakref.ref(leaf, partial(self._forget_tensor, key)), alone)

    def tensors(self) -> list[Tensor]:
        """Return the tensors of handed-out batches that are still alive and belong to one batch."""
        found = [known() for known, receipt in self._known.values() if receipt is not None]
        return [tensor for tensor in found if tensor is not None]

    def claim(self, claim: Claim, batch: Any, rows: int) -> Claim:
        """Add the rows of one ``backward``, without padding, to the claim of a logical batch.

        Rows that cannot be from one handed-out batch that no step has used yet are refused.
        """
        found = {known for leaf in _tensors(batch) if (known := self._receipt_of(leaf)) is not None}
        if claim.receipt is not None:
            found.add(claim.receipt)
        if len(found) > 1:
            raise UnaccountedBatchError(_SEVERAL.format(numbers=_numbers(found)))
        total = claim.rows + rows
        if not found:
            if not any(receipt.rows >= total for receipt in self._unspent_in_order()):
                raise UnaccountedBatchError(self._unknown_batch_message(total))
            return Claim(None, total)
        (receipt,) = found
        if not self._is_unspent(receipt):
            raise UnaccountedBatchError(_SPENT.format(number=receipt.index))
        if total > receipt.rows:
            raise UnaccountedBatchError(
                f"backward received {total} rows of batch {receipt.index} of the loader, which has {receipt.rows}. "
                + _ONE_STEP
            )
        return Claim(receipt, total)

    def receipt_to_spend(self, claim: Claim) -> Receipt:
        """Return the receipt that a step on a logical batch would spend, without spending it.

        Refuse part of a batch, a batch that a step has used, and a gap that must not be.
        """
        receipt = claim.receipt
        if receipt is None:
            fitting = [
                receipt for receipt in self._unspent_in_order() if receipt.rows == claim.rows
            ]
            if not fitting:
                raise UnaccountedBatchError(self._unknown_batch_message(claim.rows))
            receipt = fitting[0]
        elif not self._is_unspent(receipt):
            raise UnaccountedBatchError(_SPENT.format(number=receipt.index))
        if claim.rows != receipt.rows:
            raise UnaccountedBatchError(
                f"step: the logical batch holds {claim.rows} of the {receipt.rows} rows of batch {receipt.index} of "
                "the loader; which rows are left out may depend on the data. Pass all rows to backward, in one call or "
                "several."
            )
        self._refuse_left_out(receipt)
        return receipt

    def check_share(self, rank: int, ranks: int) -> None:
        """Refuse batches from other data than the part of one of several processes."""
        if self._share != (rank, ranks):
            part, parts = self._share
            raise UnaccountedBatchError(
                f"step: the loader of rank {rank} samples from part {part} of {parts} of the data, but {ranks} ranks "
                "train together, so a sample could be in a batch more often than is accounted for. Make the loader "
                f"with rank={rank}, num_replicas={ranks}; it finds both by itself after init_process_group."
            )

    def spend(self, receipt: Receipt) -> None:
        """Mark a batch as used in a step."""
        del self._unspent[receipt.index]
        self._last_spent = max(self._last_spent, receipt.index)

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor

    def _receipt_of(self, tensor: Tensor) -> Receipt | None:
        return self._known[id(tensor)][1] if self._is_known(tensor) else None

    def _forget_tensor(self, key: int, _: object) -> None:
        known = self._known.get(key)
        if known is not None and known[0]() is None:
            del self._known[key]

    def _is_unspent(self, receipt: Receipt) -> bool:
        return self._unspent.get(receipt.index) is receipt

    def _unspent_in_order(self) -> list[Receipt]:
        """Return receipts of batches handed out after the last batch that was used in a step, oldest first."""
        return [receipt for index, receipt in self._unspent.items() if index > self._last_spent]

    def _refuse_left_out(self, receipt: Receipt) -> None:
        """Refuse a step after a left-out batch that was empty, which would reveal this, or after a gap in a pass."""
        for index, other in self._unspent.items():
            if index < receipt.index and other.rows == 0:
                raise UnaccountedBatchError(
                    f"step: batch {index} of the loader was empty, and no step was taken on it. Leaving it out reveals "
                    "that it was empty. Call backward and step for empty batches too; they get noise."
                )
            if index < receipt.index and self._without_gaps:
                raise UnaccountedBatchError(
                    f"step: batch {index} of the {self._without_gaps} loader was left out, or comes later. Samples "
                    "would then be used more often, or sooner again, than is accounted for. Take a step on every "
                    "batch, in the loader's order."
                )

    def _unknown_batch_message(self, rows: int) -> str:
        waiting = self._unspent_in_order()
        if not waiting:
            return (
                f"backward received a batch of {rows} rows that no loader of this plan made for this step, or on which "
                "a step was taken already. " + _SOURCES
            )
        return (
            f"a logical batch of {rows} rows does not fit: the loader of this plan made batches of {_sizes(waiting)}. "
            + _ONE_STEP
        )


_ONE_STEP = (
    "One batch of the loader is one step: split a large batch over several backward calls, but do not add up batches; "
    "for larger batches, plan a larger expected_batch_size. The sample axis must come first. If a loader of the plan "
    "begins an iteration, the iteration before it ends."
)
_SOURCES = (
    "With a plan, steps must use batches that the plan accounts for. Make them with "
    "clipgrad.poisson_loader(dataset, plan=plan), user_loader or shuffled_loader, and with the optimizer's own plan "
    "object. Or declare how you sample batches: PrivacyPlan(declared_sampling='...')."
)
_SEVERAL = (
    "backward received rows of several batches of the loader, numbers {numbers}, for one step. "
    + _ONE_STEP
)
_SPENT = (
    "batch {number} of the loader was used in a step already, or its iteration has ended. A second step on it would "
    "cost privacy that is not accounted for. Use each batch of the loader once, for one optimizer. One DPOptimizer can "
    "wrap several inner optimizers (docs/sampling.md)."
)


def rows_in(batch: Any, is_padding: Any) -> int:
    """Return the rows of a batch that are no padding, by its first tensor; 0 if it holds none."""
    first = next(_tensors(batch), None)
    if first is None or first.dim() == 0:
        return 0
    # A mask that is none is refused later, with its own message.
    usable = isinstance(is_padding, Tensor) and not is_padding.is_meta
    return first.shape[0] - (int(is_padding.sum()) if usable else 0)


def _tensors(batch: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(
            leaf, Mapping
        ):  # a mapping that is no pytree node, such as Hugging Face's BatchEncoding
            yield from _tensors(dict(leaf))


def _numbers(receipts: Iterable[Receipt]) -> str:
    return " and ".join(str(index) for index in sorted(receipt.index for receipt in receipts))


def _sizes(receipts: list[Receipt]) -> str:
    sizes = ", ".join(str(receipt.rows) for receipt in receipts[:3])
    return f"{sizes}{', ...' if len(receipts) > 3 else ''} rows"
