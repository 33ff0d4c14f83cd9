"""Cut tensors into pieces. Nothing here is random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def contiguous_targets(
    tensors: Sequence[Tensor],
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return one contiguous tensor to write to for each tensor, and the additions that must follow.

    A tensor whose memory has gaps has no contiguous view: its noise is written to dense zeros, which are added to it.
    The second list holds these pairs ``(tensor, zeros)``.
    """
    targets, additions = list(tensors), []
    if all(map(Tensor.is_contiguous, targets)):
        return targets, []
    for index, tensor in enumerate(targets):
        view = _contiguous_view(tensor)
        if view is None:
            view = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            additions.append((tensor, view.view(tensor.shape)))
        targets[index] = view
    return targets, additions


def _contiguous_view(tensor: Tensor) -> Tensor | None:
    """Return the tensor's values in the order of memory, or None if that memory has gaps."""
    if tensor.is_contiguous():
        return tensor
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered if ordered.is_contiguous() else None


def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a flat view of each contiguous tensor."""
    return [tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in tensors]


def pieces(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Yield all values of contiguous tensors in parts of ``limit`` values; the last part may be smaller."""
    if 0 < sum(map(Tensor.numel, tensors)) <= limit:
        yield tensors
        return
    piece: list[Tensor] = []
    room = limit
    for tensor in tensors:
        start, size = 0, tensor.numel()
        while start < size:
            taken = min(room, size - start)
            piece.append(tensor if taken == size else tensor.view(-1)[start : start + taken])
            start += taken
            room -= taken
            if not room:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece
