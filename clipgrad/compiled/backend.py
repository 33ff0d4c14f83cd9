"""Compile a plain graph with ``torch.compile``. Every use of its private interface is in this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

Run = Callable[..., Sequence[Tensor]]


def uses_cuda_graphs(mode: str) -> bool:
    """Return whether the mode uses CUDA graphs; ``cuda_graphs.py`` records them."""
    return mode in ("reduce-overhead", "max-autotune")


def compile_graph(module: GraphModule, mode: str) -> Run:
    """Return a function that compiles the graph at its first run.

    Random operations are PyTorch's own (``fallback_random``): they take the same random numbers from the global
    generator as the eager step, so a compiled loss with dropout can be compared with the eager loss. All options apply
    to this graph only; no global option is changed. ``mode`` is one of ``COMPILE_MODES``.
    """
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode))
    options["fallback_random"] = True
    options["triton.cudagraphs"] = False
    # This pass moves weight gradients next to their norms at the end, so all activations and gradients stay alive.
    options["reorder_for_locality"] = False
    # Compile forward, not the module: global module hooks are part of the trace, and would run on this module again.
    run: Run = torch.compile(module.forward, fullgraph=True, dynamic=False, options=options)
    return run
