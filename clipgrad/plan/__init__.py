"""What a private run promises, and what was done of it: the plan, its batches, its ledger."""

from __future__ import annotations

from clipgrad.plan.privacy_plan import PrivacyPlan

__all__ = ["PrivacyPlan"]
