"""Random batches: each sample, or each user, is in each batch with the same probability.

That is Poisson sampling, which privacy amplification and so :mod:`clipgrad.accounting` assumes
(Abadi et al., "Deep Learning with Differential Privacy", 2016). Batches then differ in size, and
some are empty: an empty batch is still a step and still gets its noise.

:func:`poisson_loader` draws samples, :func:`user_loader` draws users with what is theirs. Either
can have a largest size (truncated Poisson sampling), be padded to it, and be shared among ranks.
:func:`shuffled_loader` draws the shuffled batches of a fixed size of a plan that claims no amplification.
"""

from __future__ import annotations

from clipgrad.sampling._collate import EmptyBatchCollate, PaddedBatch
from clipgrad.sampling._loader import PrivateLoader
from clipgrad.sampling._make import poisson_loader, shuffled_loader, user_loader
from clipgrad.sampling._poisson import PoissonSampler
from clipgrad.sampling._shuffled import ShuffledSampler
from clipgrad.sampling._users import UserSampler

__all__ = [
    "EmptyBatchCollate",
    "PaddedBatch",
    "PoissonSampler",
    "PrivateLoader",
    "ShuffledSampler",
    "UserSampler",
    "poisson_loader",
    "shuffled_loader",
    "user_loader",
]
