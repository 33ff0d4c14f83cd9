"""This package has the rules for RNN, LSTM and GRU layers and cells."""

from __future__ import annotations

from clipgrad.rules.recurrent import recurrent

__all__ = ["recurrent"]
