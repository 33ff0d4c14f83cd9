"""This file defines the exceptions of clipgrad."""

from __future__ import annotations


class NotPerSampleError(RuntimeError):
    """The loss contains an operation whose gradient cannot be attributed to single samples.

    The message names the operation and a replacement. Nothing was clipped, and no gradient was written.
    """


class EscapedParameterError(NotPerSampleError):
    """A parameter entered the loss in a way that clipgrad does not control, so its gradient would escape clipping."""


class UnclippedGradientError(RuntimeError):
    """A step was requested on a gradient that this optimizer did not clip."""


class PrivacyBudgetError(RuntimeError):
    """A step was requested that the privacy plan does not include; nothing was released."""


class UnaccountedBatchError(RuntimeError):
    """The privacy plan does not account for a batch; nothing was released."""


class RanksError(RuntimeError):
    """The processes that train together differ in what they do, or one of them is gone; the message names it."""


class CompileError(RuntimeError):
    """The step cannot be compiled, or can no longer be; the message says why and what to do instead."""


class CompileMismatchError(CompileError):
    """The compiled step does not compute what the eager step computes, so it must not be used."""
