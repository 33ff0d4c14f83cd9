"""A lower bound on epsilon from one training run: what an attack on your own training can show.

Mark ``m`` samples as canaries and let a secret fair coin decide of each whether it is trained on
(:class:`Canaries`). Train. Score the canaries, high where the run looks as if it had seen them, from
the trained model alone (:func:`canary_losses`) or from every step (:class:`StepRecorder`). From how
many coins the scores guess right follows, with a stated confidence, an epsilon that the run exceeds
(:func:`lower_bound`).

The accountant gives an upper bound that rests on a proof and on the code that the proof is about; an
audit gives a lower bound that rests on neither. A lower bound above the claim is evidence of a bug.
One below it is no evidence of its absence: a weak attack finds little, whatever the truth.

The method is that of Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run"
(2023, arXiv:2305.08846); the sharper test against a Gaussian's trade-off curve is that of
Mahloujifar, Melis and Chaudhuri, "Auditing f-Differential Privacy in One Run" (2024,
arXiv:2410.22235). The mathematics needs scipy, which comes with the extra ``accounting``.
"""

from __future__ import annotations

from clipgrad.audit._bound import AuditResult, lower_bound
from clipgrad.audit._coins import Canaries, coin_flips
from clipgrad.audit._losses import canary_losses
from clipgrad.audit._recorder import StepRecorder

__all__ = [
    "AuditResult",
    "Canaries",
    "StepRecorder",
    "canary_losses",
    "coin_flips",
    "lower_bound",
]
