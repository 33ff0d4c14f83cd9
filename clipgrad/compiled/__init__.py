"""The clipped step of a microbatch as one plain graph, compiled once and compared before it is trusted.

====================  ===========================================================================
``trace``             makes a graph of plain operations of the eager step on the captured loss
``decompositions``    how the tracer writes some operations
``duplicates``        computes equal expressions once
``shared_grams``      computes one Gram matrix of an input that layers share
``randomness``        tells which operations may draw random numbers
``zeroing``           lets the graph select rows in place where nobody reads them again
``position_sums``     keeps sums over positions apart from the gradient of an activation
``padded_outputs``    computes the gradient of padded logits before it pads it
``signature``         decides whether a graph serves; PyTorch's guards watch the user's Python
``shape``             decides to which numbers of rows batches are padded
``backend``           hands the graph to TorchInductor
``recorder``          records work as a CUDA graph, in memory that recordings share
``cuda_graphs``       decides when the compiled graph is recorded, and replays it
``check``             compares the compiled graph with the eager step
``compiler``          puts these together: ``Compiler``
``runner``            runs the microbatches of a call: ``MicrobatchRunner``
====================  ===========================================================================
"""

from __future__ import annotations

from clipgrad.compiled.compiler import Compiler
from clipgrad.compiled.runner import MicrobatchRunner
from clipgrad.compiled.shape import fixed_size

__all__ = ["Compiler", "MicrobatchRunner", "fixed_size"]
