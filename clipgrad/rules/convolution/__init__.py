"""This package has the rules for convolutions of one to three axes, including transposed convolutions."""

from __future__ import annotations

from clipgrad.rules.convolution import convolution

__all__ = ["convolution"]
