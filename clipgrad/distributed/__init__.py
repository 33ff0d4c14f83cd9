"""Train on several processes of ``torch.distributed``; ``DPOptimizer`` finds them by itself.

Each process clips its own samples. Clipped sums are added up over all processes, and each process noises its own part
of the coordinates from a key of its own, so every coordinate gets one draw. See ``docs/scaling.md``.
"""

from __future__ import annotations

from clipgrad.distributed.finding import find_ranks
from clipgrad.distributed.replicated import Replicated

__all__ = ["Replicated", "find_ranks"]
