"""Plan a private run and keep its state: ``PrivacyPlan``, receipts for its batches, and its ledger."""

from __future__ import annotations

from clipgrad.plan.privacy_plan import PrivacyPlan

__all__ = ["PrivacyPlan"]
