"""Make random batches: each sample, or each user, is in each batch with the same probability.

This is Poisson sampling, which privacy amplification and so :mod:`clipgrad.accounting` assumes (Abadi et al., "Deep
Learning with Differential Privacy", 2016). Batches differ in size, and some are empty: an empty batch is still a step
and still gets its noise.

:func:`poisson_loader` samples single samples, and :func:`user_loader` samples users with their samples. Both can limit
the batch size (truncated Poisson sampling), pad batches to that size, and split the dataset among ranks.
:func:`shuffled_loader` makes shuffled batches of a fixed size, for a plan that claims no amplification.
:func:`check_collation` finds a ``collate_fn`` that lets samples of a batch change each other.
"""

from __future__ import annotations

from clipgrad.sampling._check_collation import check_collation
from clipgrad.sampling._collate import EmptyBatchCollate, PaddedBatch
from clipgrad.sampling._loader import PrivateLoader
from clipgrad.sampling._make import poisson_loader, shuffled_loader
from clipgrad.sampling._poisson import PoissonSampler
from clipgrad.sampling._shuffled import ShuffledSampler
from clipgrad.sampling._user_loader import user_loader
from clipgrad.sampling._users import UserSampler

__all__ = [
    "EmptyBatchCollate",
    "PaddedBatch",
    "PoissonSampler",
    "PrivateLoader",
    "ShuffledSampler",
    "UserSampler",
    "check_collation",
    "poisson_loader",
    "shuffled_loader",
    "user_loader",
]
