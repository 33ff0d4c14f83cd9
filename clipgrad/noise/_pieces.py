"""Cutting tensors into pieces and sharing the pieces out over threads. Nothing here is random."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait

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


def share_out(
    pieces: Sequence[list[Tensor]],
    workers: Sequence[Callable[[list[Tensor]], None]],
    threads: Executor,
) -> None:
    """Have every piece worked on once: by the first worker in this thread, by the others in theirs.

    Raises what a worker raised, once all have stopped: a piece that failed must not pass for done.
    """
    waiting = deque(pieces)
    inference = torch.is_inference_mode_enabled()

    def run(worker: Callable[[list[Tensor]], None]) -> None:
        # Gradient and inference mode belong to a thread, so each enters them anew.
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                worker(piece)

    helpers = [threads.submit(run, worker) for worker in workers[1:]]
    try:
        run(workers[0])
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()
