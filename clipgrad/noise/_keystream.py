"""Random bytes on the CPU: AES-128 in counter mode."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

KEY_BYTES = 16  # of 32 it took a third longer, and nobody searches 2^128 keys
SLACK = (
    15  # bytes behind the last: the library wants room for one more block, though it never fills it
)
_FIRST_BLOCK = bytes(16)


class Keystream:
    """The keystream of one key from block 0 on (NIST SP 800-38A, section 6.5).

    The counter is the cipher's own and only moves forward. A key must be given to one keystream
    only: ``Lineage.key`` hands each out once.
    """

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(AES(key), CTR(_FIRST_BLOCK)).encryptor()

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        """Write the next ``len(zeros)`` bytes to the buffer, at least ``SLACK`` longer than that."""
        self._encryptor.update_into(zeros, buffer)
