"""Random bytes on the CPU come from AES-128 in counter mode, by the faster of two implementations.

Encrypting zeros in GCM gives the keystream of its counter mode, GCTR (NIST SP 800-38D, section 6.5). CTR gives the same
bytes from the same counter. OpenSSL uses 512-bit AES instructions in GCM only: 0.42 ns per float32 value instead of
0.72 with CTR, including GCM's checksum, which is not used. On a processor without these instructions GCM took 1.4 ns,
CTR 0.74. So a trial at first use selects the faster mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM

KEY_BYTES = 16  # keys of 32 bytes took a sixth longer, and a search of 2^128 keys is infeasible
# The library demands space for one more block behind the buffer, without filling it.
SLACK = 15
KEY_GOOD_FOR = 2**35
"""A key serves this many bytes. GCM's 32-bit counter ends at 2^36, and the library refuses to go further."""
FIRST_BLOCK = 2
"""The keystream starts at this counter: GCM reserves block 1 for its checksum, and encrypts zeros for it."""
_NONCE = bytes(12)  # constant, since every key is used once
_FIRST_COUNTER = _NONCE + FIRST_BLOCK.to_bytes(4, "big")
_TRIED_BYTES, _TRIALS = 2**16, 5


class Bits(Protocol):
    """This protocol describes a source of random bits."""

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        """Write ``len(zeros)`` bytes to ``buffer``, which must be at least ``SLACK`` bytes longer."""
        ...


class Keystream:
    """This class writes bytes that never repeat: the cipher counts its own blocks and cannot go back.

    ``new_key`` is called for the first key and after every ``KEY_GOOD_FOR`` bytes. It must never return the same key
    twice, in this object or elsewhere; ``KeyDeriver.key`` never does.
    """

    def __init__(self, new_key: Callable[[], bytes]) -> None:
        self._new_key = new_key
        self._left = 0

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        """Write the next ``len(zeros)`` bytes to ``buffer``, which must be at least ``SLACK`` bytes longer."""
        if len(zeros) > self._left:
            self._encryptor = cipher(self._new_key(), fastest_mode())
            self._left = KEY_GOOD_FOR
        self._left -= len(zeros)
        self._encryptor.update_into(zeros, buffer)


def cipher(key: bytes, mode: type[GCM | CTR]) -> CipherContext:
    """Return an encryptor with GCM's counters; its output does not depend on the mode."""
    counter = GCM(_NONCE) if mode is GCM else CTR(_FIRST_COUNTER)
    return Cipher(AES(key), counter).encryptor()


@cache
def fastest_mode() -> type[GCM | CTR]:
    """Return the mode that is faster on this processor, by a trial of 0.1 ms with a key used for nothing else."""
    zeros = memoryview(bytes(_TRIED_BYTES))
    buffer = memoryview(bytearray(_TRIED_BYTES + SLACK))

    def seconds(mode: type[GCM | CTR]) -> float:
        trial, taken = cipher(bytes(KEY_BYTES), mode), []
        for _ in range(_TRIALS):
            start = time.perf_counter()
            trial.update_into(zeros, buffer)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return CTR if seconds(CTR) < seconds(GCM) else GCM
