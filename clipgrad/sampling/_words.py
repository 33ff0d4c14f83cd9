"""Random 64-bit words: all that the samplers draw."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]
"""Draws so many words, each uniform on ``0 ... 2**64 - 1`` and independent of the others."""


def words_from(generator: torch.Generator | None) -> Words:
    """The operating system's words, or the repeatable and NOT PRIVATE ones of a generator.

    Raises:
        TypeError: If ``generator`` is not a generator on the CPU.
    """
    if generator is None:
        return system_words
    if getattr(generator, "device", None) != torch.device("cpu"):
        raise TypeError(
            f"generator must be a torch.Generator on the CPU, got {generator!r}; leave it out "
            "for private batches."
        )
    return partial(seeded_words, generator)


def system_words(count: int) -> NDArray[np.uint64]:
    """From the operating system's cryptographic generator.

    This process keeps no state, so that nothing could be shared by a fork, a copy or a checkpoint.
    """
    return np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)


def seeded_words(generator: torch.Generator, count: int) -> NDArray[np.uint64]:
    """The next words of a generator, which advances."""
    words = torch.empty(count, dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=generator)
    return words.numpy().view(np.uint64)
