"""This module computes the expected ChaCha20 noise on the CPU and compares a device with it, without Triton."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

BLOCKS_AT_ONCE = 128  # blocks that a program computes at a time
PER_BLOCK = {torch.float64: 8, torch.float32: 16}  # values made from one block
RFC_KEY = bytes(range(32))
RFC_NONCE = bytes.fromhex("000000090000004a00000000")
RFC_BLOCK = bytes.fromhex(
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)
_SCALE, _DIVISOR = 3.0, 7.0
_RELATIVE = {torch.float64: 1e-11, torch.float32: 1e-6}
_Floats = NDArray[np.float64]


def verify(cipher: Any, device: torch.device) -> None:
    """Raise RuntimeError unless the device agrees with RFC 8439, the CPU's keystream and Gaussians of the same bits.

    ``cipher`` has the methods of ``chacha_launch.TritonChaCha``.
    """
    if cipher.blocks(RFC_KEY, RFC_NONCE, 1)[:64] != RFC_BLOCK:
        raise RuntimeError("the device's ChaCha20 fails the test vector of RFC 8439, 2.3.2")
    nonce = bytes(range(100, 112))
    if cipher.blocks(RFC_KEY, nonce, 2**31 - 5) != keystream(
        RFC_KEY, nonce, 2**31 - 5, BLOCKS_AT_ONCE
    ):
        raise RuntimeError("the device's ChaCha20 keystream differs from the CPU's")
    for words in edges():
        error = relative_error(cipher.pairs(words), pairs_float32(words))
        if not error <= _RELATIVE[torch.float32]:
            raise RuntimeError(f"the device's Gaussians have a relative error of {error}")
    for dtype, draws in [(torch.float64, 1), (torch.float64, 2), (torch.float32, 1)]:
        size = PER_BLOCK[dtype] * BLOCKS_AT_ONCE + 1  # one full program and one value of the next
        zeros = torch.zeros(size, dtype=dtype, device=device)
        # NaN replaces results of an earlier self-test in reused memory. A public key is safe for discarded values.
        found = torch.full_like(zeros, math.nan)
        cipher.add_gaussian_([zeros], _SCALE, draws, RFC_KEY, _DIVISOR, [found])
        expected = _SCALE / _DIVISOR * gaussians(RFC_KEY, size, draws, dtype)
        error = relative_error(found.cpu().numpy(), expected, floor=0.0 if draws == 1 else 1.0)
        if not error <= _RELATIVE[dtype]:
            raise RuntimeError(f"the device's noise has a relative error of {error} in {dtype}")


def relative_error(
    found: NDArray[np.float32] | _Floats, expected: _Floats, floor: float = 0.0
) -> float:
    """Return the largest error, or NaN if any value is NaN, relative to the value or to ``floor`` if this is larger."""
    return float((np.abs(found - expected) / np.maximum(np.abs(expected), floor)).max())


def keystream(key: bytes, nonce: bytes, first: int, blocks: int) -> bytes:
    cipher = Cipher(ChaCha20(key, first.to_bytes(4, "little") + nonce), mode=None)
    return cipher.encryptor().update(bytes(64 * blocks))


def edges() -> list[NDArray[np.uint32]]:
    """Return all pairs of extreme words, at the ends, in the middle and at powers of 2, which random tests miss."""
    near = {0, 1, 2, 3, 2**20, 2**22 - 1, 2**24 + 1, 3037000499, 3037000500}  # 2^32 sqrt(1/2)
    near |= {2**30, 2**30 - 1, 2**31 - 1, 2**31 - 2**7, 0x2AAAAAAA}
    words = sorted(near | {2**32 - 1 - word for word in near})
    grid = np.array([(w0, w1) for w0 in words for w1 in words], dtype=np.uint32)
    return list(np.resize(grid, (-(-len(grid) // BLOCKS_AT_ONCE), BLOCKS_AT_ONCE, 2)))


def pairs_float32(words: NDArray[np.uint32]) -> _Floats:
    """Compute the float32 formula of ``box_muller_kernels`` in float64 for pairs of words, ``[n, 2]``."""
    w0, w1 = words.astype(np.int64).T
    u = (w0 * 2.0**20 + (w1 >> 2 & 2**20 - 1) + 0.5) / 2.0**52
    radius = np.sqrt(-2 * np.log(u))
    signed = np.where(w1 < 2**31, w1, w1 - 2**32) >> 2
    angle = (signed + 0.5) * (np.pi / 2**31)
    near = radius * np.sin(angle)
    far = radius * np.cos(angle) * np.where(w1 & 1, -1.0, 1.0)
    swapped = (w1 & 2) != 0
    return np.stack([np.where(swapped, far, near), np.where(swapped, near, far)], axis=-1)


def pairs_float64(words: NDArray[np.uint32]) -> _Floats:
    """Compute the float64 formula of ``box_muller_kernels`` for four words per pair, ``[n, 4]``."""
    j, k = np.ascontiguousarray(words).view("<i8").T
    radius = np.sqrt(-2 * np.log(np.abs(j.astype(np.float64) + 0.5) * 2.0**-63))
    angle = (k.astype(np.float64) + 0.5) * (np.pi / 2**64)
    sign = np.where(k & 1, -1.0, 1.0) * np.sign(angle)
    return np.stack([radius * np.sin(angle), radius * sign * np.cos(angle)], axis=-1)


def gaussians(key: bytes, size: int, draws: int, dtype: torch.dtype) -> _Floats:
    """Return the noise for one tensor of ``size`` values with a sigma of 1."""
    per_block = PER_BLOCK[dtype]
    rounds = -(-size // (per_block * BLOCKS_AT_ONCE))
    words = np.frombuffer(
        keystream(key, bytes(12), 0, rounds * BLOCKS_AT_ONCE * draws), dtype="<u4"
    )
    if dtype is torch.float64:
        values = pairs_float64(words.reshape(-1, 4))
    else:
        values = pairs_float32(words.reshape(-1, 2))
    # [round, block, draw, value] -> [round, value, block]: neighbouring blocks hold neighbouring values.
    summed = values.reshape(rounds, BLOCKS_AT_ONCE, draws, per_block).sum(2) / math.sqrt(draws)
    flat: _Floats = summed.transpose(0, 2, 1).reshape(-1)
    return flat[:size]
