"""Run a region of a graph as one operation, which the active mode may run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def run_region(body: Callable[..., Any], draws: bool, *args: Any) -> Any:
    """Run the body, a pure function of tensors and numbers, or leave it to the active mode.

    Args:
        body: The region's function.
        draws: Whether the body may draw random numbers; the mode reads this.
        *args: Arguments of the body.
    """
    tensors = tuple(arg for arg in args if isinstance(arg, Tensor))
    if has_torch_function(tensors):
        return handle_torch_function(run_region, tensors, body, draws, *args)
    return body(*args)
