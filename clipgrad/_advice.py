"""What to do instead, where PyTorch's own message only says what it could not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from clipgrad.errors import NotPerSampleError


class _Advice(NamedTuple):
    fragments: tuple[str, ...]
    remedy: str


_ADVICE = (
    _Advice(
        ("data-dependent control flow", "Boolean value of Tensor"),
        "the loss branches on the value of a tensor (data-dependent control flow), so different samples would "
        "run different code. Write the branch as torch.where(condition, a, b), or compute the condition from "
        "Python values.",
    ),
    _Advice(
        (".item() on a Tensor", "item() on a Tensor"),
        "the loss reads the value of a tensor with .item() (or int(), float()), which is data-dependent control "
        "flow: under per-sample gradients it has one value per sample. Keep it a tensor.",
    ),
    _Advice(
        (
            "vmap: inplace arithmetic",
            "in-place",
            "inplace",
            "doesn't match the broadcast shape",
            "on out= or view ops",
        ),
        "the loss writes a per-sample value in place into a tensor that all samples share (a buffer, such as "
        "running statistics, or a tensor made outside). Use the out-of-place form, return the value with "
        "has_aux=True, or put the layer in eval mode.",
    ),
    _Advice(
        ("randomness mode", "randomness='error'"),
        'the loss is random, and randomness="error" forbids that; use randomness="different" (each sample its own '
        "dropout mask).",
    ),
    _Advice(
        ("setup_context", "generate_vmap_rule", "vmap staticmethod"),
        "the loss calls a custom autograd.Function that vmap cannot batch. Give it setup_context and "
        "generate_vmap_rule = True (or a vmap static method). If it is torch.utils.checkpoint, drop it: "
        "microbatch_size bounds the memory instead.",
    ),
    _Advice(
        ("escaped from inside a function being vmapped",),
        "the loss recomputes part of its forward pass during the backward pass (torch.utils.checkpoint), outside the "
        "transform. Switch checkpointing off: microbatch_size bounds the memory instead.",
    ),
    _Advice(
        ("dynamic shape", "dynamic in shape", "output has dynamic shape", "nonzero"),
        "the loss makes a tensor whose shape depends on the data (nonzero, boolean indexing, unique), which differs "
        "from sample to sample: data-dependent control flow. Use torch.where or a mask of fixed shape.",
    ),
)


@contextmanager
def explained() -> Iterator[None]:
    """Turn PyTorch's refusals into ``NotPerSampleError`` with a remedy; other errors pass."""
    try:
        yield
    except NotPerSampleError:
        raise
    except (RuntimeError, ValueError) as error:
        advice = _advice(str(error))
        if advice is None:
            raise
        raise NotPerSampleError(advice) from error


def _advice(message: str) -> str | None:
    """The remedy for one of PyTorch's messages, or None."""
    for advice in _ADVICE:
        if any(fragment in message for fragment in advice.fragments):
            return advice.remedy
    return None
