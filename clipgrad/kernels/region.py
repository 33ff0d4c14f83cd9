"""A region of a graph that may be run again in the backward pass; whoever watches operations sees it as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def run_region(body: Callable[..., Any], draws: bool, *args: Any) -> Any:
    """Run the body, a pure function of tensors and numbers, or leave it to the mode that is active.

    ``draws`` says whether the body may draw random numbers.
    """
    tensors = tuple(arg for arg in args if isinstance(arg, Tensor))
    if has_torch_function(tensors):
        return handle_torch_function(run_region, tensors, body, draws, *args)
    return body(*args)
