"""Random bytes on the CPU: AES-128 in counter mode, as Galois/Counter Mode computes it.

Encrypting zeros in GCM gives the keystream of its counter mode, GCTR (NIST SP 800-38D, section 6.5), and CTR gives the
same from the same counter on. OpenSSL has 512-bit AES instructions in GCM only: 0.42 ns a float32 value beside 0.72 for
CTR, with the checksum that nobody asks for. On a processor without them GCM took 1.4 beside 0.74. So whichever is
faster here makes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM

KEY_BYTES = 16  # of 32 it took a sixth longer, and nobody searches 2^128 keys
SLACK = (
    15  # bytes behind the last: the library wants room for one more block, though it never fills it
)
KEY_GOOD_FOR = 2**35
"""Bytes. GCM's counter has 32 bits and ends at 2^36; the library refuses to go further."""
FIRST_BLOCK = 2
"""Of the keystream: GCM keeps block 1 for its checksum, and encrypts a block of zeros for it."""
_NONCE = bytes(12)  # a key is used once
_FIRST_COUNTER = _NONCE + FIRST_BLOCK.to_bytes(4, "big")
_TRIED_BYTES, _TRIALS = 2**16, 5


class Bits(Protocol):
    """Where the bits of Gaussians come from."""

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        """Write ``len(zeros)`` bytes to the buffer, at least ``SLACK`` longer than that."""
        ...


class Keystream:
    """Bytes that never come again.

    The counter is the cipher's own and only moves forward.

    Args:
        new_key: Called for the first key, and for another one whenever ``KEY_GOOD_FOR`` bytes have been drawn from one.
            None may come twice, here or anywhere: ``Lineage.key`` hands each out once.
    """

    def __init__(self, new_key: Callable[[], bytes]) -> None:
        self._new_key = new_key
        self._left = 0

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        """Write the next ``len(zeros)`` bytes to the buffer, at least ``SLACK`` longer than that."""
        if len(zeros) > self._left:
            self._encryptor = cipher(self._new_key(), fastest())
            self._left = KEY_GOOD_FOR
        self._left -= len(zeros)
        self._encryptor.update_into(zeros, buffer)


def cipher(key: bytes, mode: type[GCM | CTR]) -> CipherContext:
    """What encrypts by the counters of GCM; the result does not depend on the mode."""
    counter = GCM(_NONCE) if mode is GCM else CTR(_FIRST_COUNTER)
    return Cipher(AES(key), counter).encryptor()


@cache
def fastest() -> type[GCM | CTR]:
    """The mode whose code is faster on this processor.

    From a trial of 0.1 ms, with a key that is used for nothing else.
    """
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
