"""Convolutions of one to three axes, transposed ones included."""

from __future__ import annotations

from clipgrad.rules.convolution import convolution

__all__ = ["convolution"]
