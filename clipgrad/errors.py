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
