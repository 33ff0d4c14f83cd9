"""The clipped step of a microbatch as one plain graph, compiled once and checked before it is trusted.

=================  ===============================================================================
``_graph``         traces the eager step to a graph of plain operations; nothing is left out of it
``_observe``       which Python functions ran while it was traced
``_walk``          writes down what those functions can read: values of every kind
``_objects``       attributes of objects, classes and modules, those that they lack included
``_elsewhere``     caches, references, registries, levels of loggers, the environment
``_places``        one place at a time
``_state``         what was written down, and whether it is still the same
``_signature``     everything else that decides what a graph looks like
``_shape``         one fixed number of rows for batches of every size
``_backend``       hands the graph to ``torch.compile``
``_replay``        records the compiled graph as a CUDA graph, and replays it
``_check``         compares the compiled graph with the eager step
``_step``          puts these together: ``Compiler``
``_runner``        runs the microbatches of a call on what it made: ``MicrobatchRunner``
=================  ===============================================================================
"""

from __future__ import annotations

from clipgrad.compiled.observe import observed
from clipgrad.compiled.runner import MicrobatchRunner
from clipgrad.compiled.shape import fixed_size
from clipgrad.compiled.step import Compiler

__all__ = ["Compiler", "MicrobatchRunner", "fixed_size", "observed"]
