"""Hand a plain graph to ``torch.compile``. Every use of its private interface is in this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

Run = Callable[..., Sequence[Tensor]]


def uses_cuda_graphs(mode: str) -> bool:
    """Whether the mode asks for CUDA graphs; they are recorded in ``_replay``."""
    return mode in ("reduce-overhead", "max-autotune")


def compile_graph(module: GraphModule, mode: str) -> Run:
    """The graph, compiled at its first run.

    Random operations are PyTorch's own (``fallback_random``): they draw from the global generator what the eager step
    would draw, so a compiled loss with dropout can be compared with the eager one. All options are those of this one
    graph; nothing global is touched.

    Args:
        module: A graph of plain operations.
        mode: One of ``COMPILE_MODES``.
    """
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode))
    options["fallback_random"] = True
    options["triton.cudagraphs"] = False
    # It moves weight gradients next to their norms, to the end: then all activations and gradients live until there.
    options["reorder_for_locality"] = False
    # Not the module: hooks on all modules were traced where they ran, and would run on this one as well.
    run: Run = torch.compile(module.forward, fullgraph=True, dynamic=False, options=options)
    return run
