"""Measure the time of each phase of a clipped step, and compare it with the standard step.

``profile_step(optimizer, *batch)`` measures; ``python -m clipgrad.profile`` prints its table.
"""

from __future__ import annotations

from clipgrad.profile._measure import profile_step
from clipgrad.profile._report import StepProfile

__all__ = ["StepProfile", "profile_step"]
