"""This package decides how far each sample's gradient is scaled down, and bounds what one sample can change.

A clipping strategy combines three choices:

* What is scaled together (``_strategies``): the whole gradient, parameters by prefix, or ``PerLayer``.
* By which factor: at most 1 (clip), or ``Automatic``.
* To which norm (``_adaptive``): a number, a function of the step, or ``AdaptiveQuantile``.

``_groups`` resolves a strategy against parameter names to factors and a bound. ``_schedule`` turns a strategy that
changes from step to step into the constant strategy of the present step.
"""

from __future__ import annotations

from clipgrad.clipping._adaptive import AdaptiveQuantile
from clipgrad.clipping._groups import (
    Clipping,
    make_clipping,
    sensitivity,
)
from clipgrad.clipping._relation import Relation, relation_of
from clipgrad.clipping._schedule import StepState
from clipgrad.clipping._strategies import (
    Automatic,
    ClippingStrategy,
    PerLayer,
    Schedule,
    copy_strategy,
    is_grouped,
    with_norms,
)
from clipgrad.clipping._underflow import refuse_tiny_norms

__all__ = [
    "AdaptiveQuantile",
    "Automatic",
    "Clipping",
    "ClippingStrategy",
    "PerLayer",
    "Relation",
    "Schedule",
    "StepState",
    "copy_strategy",
    "is_grouped",
    "make_clipping",
    "refuse_tiny_norms",
    "relation_of",
    "sensitivity",
    "with_norms",
]
