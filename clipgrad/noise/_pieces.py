"""Cutting tensors into pieces. Nothing here is random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def flat_targets(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """One flat tensor to write to for each, and what to add to which tensor afterwards.

    A tensor whose memory has gaps has no flat view: it is written by way of dense zeros.
    """
    flats, detours = [], []
    for tensor in tensors:
        flat = _flat_view(tensor)
        if flat is None:
            flat = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            detours.append((tensor, flat.view(tensor.shape)))
        flats.append(flat)
    return flats, detours


def _flat_view(tensor: Tensor) -> Tensor | None:
    """The tensor's values as one axis, in the order of memory; None if that memory has gaps."""
    if tensor.is_contiguous():
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None


def pieces(flats: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """All values, in parts that together hold ``limit`` values or, at the end, fewer."""
    piece: list[Tensor] = []
    room = limit
    for flat in flats:
        start, size = 0, flat.numel()
        while start < size:
            taken = min(room, size - start)
            piece.append(flat if taken == size else flat[start : start + taken])
            start += taken
            room -= taken
            if not room:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece
