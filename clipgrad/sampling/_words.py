"""Generate random 64-bit words, the only randomness that the samplers use."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]
"""A function of a count that returns so many independent words, each uniform on ``0 ... 2**64 - 1``."""


def words_from(generator: torch.Generator | None) -> Words:
    """Return a source of words: the operating system, or a CPU generator, which is repeatable and NOT PRIVATE."""
    if generator is None:
        return system_words
    if getattr(generator, "device", None) != torch.device("cpu"):
        raise TypeError(
            f"generator must be a torch.Generator on the CPU, got {generator!r}; leave it out "
            "for private batches."
        )
    return partial(seeded_words, generator)


def system_words(count: int) -> NDArray[np.uint64]:
    """Return words from the operating system's cryptographic generator.

    The process keeps no state, so forks, copies and checkpoints share no randomness.
    """
    return np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)


def seeded_words(generator: torch.Generator, count: int) -> NDArray[np.uint64]:
    """Return the next words of a generator, and advance it."""
    words = torch.empty(count, dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=generator)
    return words.numpy().view(np.uint64)
