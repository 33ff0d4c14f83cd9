"""The exceptions that clipgrad raises on purpose."""

from __future__ import annotations


class NotPerSampleError(RuntimeError):
    """The loss does something whose gradient cannot be attributed to single samples.

    The message names the operation and what to do instead. Nothing was clipped, and no gradient was written.
    """


class EscapedParameterError(NotPerSampleError):
    """A parameter entered the loss by a road that clipgrad does not control, so its gradient would escape."""


class UnclippedGradientError(RuntimeError):
    """A step was asked for on a gradient that was not clipped by this optimizer."""


class PrivacyBudgetError(RuntimeError):
    """A step was asked for that the privacy plan does not hold; nothing was released."""


class UnaccountedBatchError(RuntimeError):
    """A batch is not what the privacy plan accounts for; nothing was released."""


class CompileError(RuntimeError):
    """The step cannot be compiled, or not any more; the message says why and what to do instead."""


class CompileMismatchError(CompileError):
    """The compiled step does not compute what the eager step computes, so it must not be used."""
