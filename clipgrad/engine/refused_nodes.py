"""Refuse nodes of the autograd graph whose operation PyTorch's ``vmap`` batches wrongly.

The capture corrects these operations under every name. Some calls the capture does not see: under
``DisableTorchFunction``, in TorchScript, in a C++ extension, or inside another operation. Their nodes are in the
autograd graph, and are refused before the backward pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clipgrad.errors import NotPerSampleError


def _has_padding(node: Any) -> bool:
    """Return whether an embedding uses padding_idx or scale_grad_by_freq, which ``vmap`` applies to all samples."""
    unset = (-1, 2**64 - 1)
    return node._saved_padding_idx not in unset or node._saved_scale_grad_by_freq


def _shares_memory(node: Any) -> bool:
    """Return whether the samples of an ``as_strided`` share memory; otherwise its gradient is right."""
    size, stride = node._saved_size, node._saved_stride
    return bool(size) and size[0] > 1 and stride[0] == 0


def _always(node: Any) -> bool:
    return True


WRONG: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "EmbeddingBackward0": ("embedding with padding_idx or scale_grad_by_freq", _has_padding),
    "LinalgSolveExBackward0": ("linalg.solve", _always),
    "AsStridedBackward0": ("as_strided", _shares_memory),
    "IndexFillBackward1": ("index_fill with a tensor as value", _always),
}


def refuse(node: Any, corrected: Sequence[tuple[int, int]]) -> None:
    """Raise ``NotPerSampleError`` for a node in ``WRONG``, unless a correction or a rule created it.

    Args:
        node: A node of the graph that is about to run, with a name in ``WRONG``.
        corrected: Ranges of autograd's sequence numbers of nodes that corrections and rules created: first, and last
            plus one.
    """
    operation, is_wrong = WRONG[type(node).__name__]
    if not is_wrong(node):
        return
    number = node._sequence_nr()
    if not any(first <= number < end for first, end in corrected):
        raise NotPerSampleError(
            f"the loss calls {operation} where clipgrad cannot see it (under DisableTorchFunction, in TorchScript, in "
            "a C++ extension, or inside another operation). PyTorch's vmap computes its gradient wrongly. Call the "
            "operation itself, in Python."
        )
