"""Train on several processes of ``torch.distributed``, which ``DPOptimizer`` finds without an option.

Each process clips its own samples. Clipped sums are added up over all processes. Each process adds noise from its own
key to its own part of the coordinates, so every coordinate gets one draw. See ``docs/scaling.md``.
"""

from __future__ import annotations

from clipgrad.distributed.finding import find_ranks
from clipgrad.distributed.replicated import Replicated

__all__ = ["Replicated", "find_ranks"]
