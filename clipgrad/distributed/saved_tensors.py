"""What the nodes of autograd's graph have saved for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

_NAMES: dict[type, list[str]] = {}


def saved_by(node: Node) -> Iterator[tuple[Any, Tensor]]:
    """Yield what a node has saved, as PyTorch's handle and as a tensor."""
    kind = type(node)
    if kind not in _NAMES:
        _NAMES[kind] = [name for name in dir(node) if name.startswith("_raw_saved_")]
    for name in _NAMES[kind]:
        raw = getattr(node, name)
        of_function = name == "_raw_saved_tensors" and hasattr(node, "saved_tensors")
        tensors = getattr(node, "saved_tensors" if of_function else name.removeprefix("_raw"))
        several = isinstance(raw, tuple | list)
        pairs: Any = zip(raw, tensors, strict=True) if several else [(raw, tensors)]
        for saved, tensor in pairs:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                yield saved, tensor
