"""Compile a plain graph with TorchInductor. Every use of its private interface is in this file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from clipgrad.compiled.views import let_views_copy

Run = Callable[..., Sequence[Tensor]]


def uses_cuda_graphs(mode: str, device: torch.device) -> bool:
    """Return whether the mode uses CUDA graphs on the device; ``cuda_graphs.py`` records them."""
    return device.type == "cuda" and mode in ("reduce-overhead", "max-autotune")


def compile_graph(module: GraphModule, mode: str, arguments: Sequence[Tensor]) -> Run:
    """Return the compiled graph.

    The graph holds plain operations already, so TorchInductor takes it as it is. ``torch.compile`` would run Dynamo
    over it first, which takes as long as the trace, and would guard every parameter at each call.

    Random operations are PyTorch's own (``fallback_random``): they take the same random numbers from the global
    generator as the eager step, so a compiled loss with dropout can be compared with the eager loss. All options apply
    to this graph only; no global option is changed.

    Args:
        module: The graph.
        mode: One of ``COMPILE_MODES``.
        arguments: Of the graph, or stand-ins for them; sizes that are symbols stay symbols.
    """
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode))
    options["fallback_random"] = True
    options["triton.cudagraphs"] = False
    # This pass moves weight gradients next to their norms at the end, so all activations and gradients stay alive.
    options["reorder_for_locality"] = False
    own = GraphModule(module, copy.deepcopy(module.graph))  # the compiler may write to it
    let_views_copy(own)
    run: Run = torch._inductor.compile(own, list(arguments), options=options)
    return run
