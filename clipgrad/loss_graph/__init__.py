"""Capture the loss of one sample as an FX graph, with PyTorch's guards that say whether the graph still holds."""

from clipgrad.loss_graph.capture import LossCapture
from clipgrad.loss_graph.graph import CapturedLoss
from clipgrad.loss_graph.reasons import CannotCapture

__all__ = ["CannotCapture", "CapturedLoss", "LossCapture"]
