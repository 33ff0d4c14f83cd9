"""This package bounds epsilon from below by one training run: it measures what an attack on the run can show.

Mark ``m`` samples as canaries, and flip a secret fair coin for each to decide whether it is trained on
(:class:`Canaries`). Train. Then score the canaries, high where the run seems to have seen them, from the trained model
alone (:func:`canary_losses`) or from every step (:class:`StepRecorder`). The number of coins that the scores guess
right gives, with a stated confidence, an epsilon that the run exceeds (:func:`lower_bound`).

The accountant's upper bound relies on a proof and on the code that the proof is about; an audit's lower bound relies on
neither. A lower bound above the claimed epsilon is evidence of a bug. A lower bound below it is no evidence that there
is none: a weak attack finds little in any run.

The method is that of Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (2023,
arXiv:2305.08846). The sharper test against a Gaussian's trade-off curve is that of Mahloujifar, Melis and Chaudhuri,
"Auditing f-Differential Privacy in One Run" (2024, arXiv:2410.22235). The mathematics needs scipy, which the extra
``accounting`` installs.
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
