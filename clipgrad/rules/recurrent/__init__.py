"""This package has the rules for RNN, LSTM and GRU layers and cells."""

from clipgrad.rules.recurrent import recurrent as recurrent
