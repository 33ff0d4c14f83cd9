"""ChaCha20 noise on a CUDA device: launches the kernels, and has them prove themselves. Needs Triton."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import triton.language as tl
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

from clipgrad.noise import _chacha_kernels as kernels

_BLOCK = 128  # lanes of a program
_PER_BLOCK = 8  # values made of one cipher block
_SMALLEST_CHUNK, _LARGEST_CHUNK = _PER_BLOCK * _BLOCK, 2**16
_ENOUGH_PROGRAMS = 2**13
_COUNTERS = 2**32  # RFC 8439 counts blocks in 32 bits
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class TritonChaCha:
    """Adds noise on one device; a launch for each dtype, however many tensors there are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def limit(self, draws: int) -> int:
        """The most values that one key is good for; a quarter of its blocks, room for what is unused."""
        return _COUNTERS // 4 * _PER_BLOCK // draws

    def add_gaussian_(self, flats: list[Tensor], sigma: float, draws: int, key: bytes) -> None:
        """Add ``N(0, sigma^2)`` to flat tensors of the device.

        Args:
            flats: One-dimensional and contiguous.
            sigma: Standard deviation, positive.
            draws: Independent values of which each value is the scaled sum.
            key: 32 bytes that are used for nothing else.

        Raises:
            RuntimeError: If the key has too few blocks; nothing is written to the tensors that are left.
        """
        groups: dict[torch.dtype, list[Tensor]] = {}
        for flat in flats:
            if flat.numel():
                groups.setdefault(flat.dtype, []).append(flat)
        first = 0
        for members in groups.values():
            first = self._launch(members, sigma / math.sqrt(draws), draws, key, first)

    def _launch(self, flats: list[Tensor], scale: float, draws: int, key: bytes, first: int) -> int:
        """Add to tensors of one dtype from block ``first`` on; the first block that is left."""
        sizes = np.array([flat.numel() for flat in flats], dtype=np.int64)
        chunk = _SMALLEST_CHUNK
        while chunk < _LARGEST_CHUNK and int(sizes.sum()) > chunk * _ENOUGH_PROGRAMS:
            chunk *= 2
        table = _table(flats, sizes, chunk, scale)
        programs = len(table) // 2
        end = first + programs * (chunk // _PER_BLOCK) * draws
        if end > _COUNTERS:
            raise RuntimeError(
                f"one key has {_COUNTERS} blocks, and {end} were asked for; pass fewer tensors at a time."
            )
        with self._on_device():
            kernels.add_gaussian[(programs,)](
                torch.from_numpy(table).to(self._device),
                chunk,
                _signed(first),
                *_words(key),
                DRAWS=draws,
                TYPE=_TYPES[flats[0].dtype],
                BLOCK=_BLOCK,
            )
        return end

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    # ------------------------------------------------------------------ proof

    def blocks(self, key: bytes, nonce: bytes, first: int) -> bytes:
        """The keystream of ``_BLOCK`` blocks as the device computes it."""
        out = torch.zeros(_BLOCK, 16, dtype=torch.int32, device=self._device)
        with self._on_device():
            kernels.store_blocks[(1,)](
                out, _signed(first), *_words(key), *_words(nonce), BLOCK=_BLOCK
            )
        return out.cpu().numpy().tobytes()

    def prove(self) -> None:
        """Compare the device with RFC 8439 and with the CPU.

        Raises:
            RuntimeError: If it computes anything else.
        """
        if self.blocks(RFC_KEY, RFC_NONCE, 1)[:64] != RFC_BLOCK:
            raise RuntimeError("the device's ChaCha20 fails the test vector of RFC 8439, 2.3.2")
        nonce = bytes(range(100, 112))
        if self.blocks(RFC_KEY, nonce, 2**31 - 5) != keystream(RFC_KEY, nonce, 2**31 - 5, _BLOCK):
            raise RuntimeError("the device's ChaCha20 is not the CPU's")
        for dtype, draws, tolerance in [(torch.float64, 2, 1e-11), (torch.float32, 1, 1e-6)]:
            found = torch.zeros(_SMALLEST_CHUNK + 1, dtype=dtype, device=self._device)
            self.add_gaussian_([found], 3.0, draws, RFC_KEY)  # a public key, on values thrown away
            expected = 3.0 * gaussians(RFC_KEY, len(found), draws)
            error = np.abs(found.cpu().double().numpy() - expected).max()
            if not error <= tolerance:
                raise RuntimeError(f"the device's noise is off by {error} in {dtype}")


def _table(
    flats: list[Tensor], sizes: NDArray[np.int64], chunk: int, scale: float
) -> NDArray[np.int64]:
    """What the kernel reads: the scale's bits; then an address and a number of values a program."""
    programs = -(-sizes // chunk)
    within = np.arange(programs.sum()) - np.repeat(programs.cumsum() - programs, programs)
    addresses = np.array([flat.data_ptr() for flat in flats], dtype=np.uint64).view(np.int64)
    table = np.empty(1 + 2 * len(within), dtype=np.int64)
    table[:1] = np.array([scale]).view(np.int64)
    table[1::2] = np.repeat(addresses, programs) + within * chunk * flats[0].element_size()
    table[2::2] = np.minimum(np.repeat(sizes, programs) - within * chunk, chunk)
    return table


def _signed(word: int) -> int:
    """As an int32, so that the kernel's type never depends on the value."""
    return word - 2**32 if word >= 2**31 else word


def _words(octets: bytes) -> list[int]:
    return [int(word) for word in np.frombuffer(octets, dtype="<i4")]


# ------------------------------------------------------------------ the CPU's answer

RFC_KEY = bytes(range(32))
RFC_NONCE = bytes.fromhex("000000090000004a00000000")
RFC_BLOCK = bytes.fromhex(
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)


def keystream(key: bytes, nonce: bytes, first: int, blocks: int) -> bytes:
    """The ``cryptography`` package's ChaCha20."""
    cipher = Cipher(ChaCha20(key, first.to_bytes(4, "little") + nonce), mode=None)
    return cipher.encryptor().update(bytes(64 * blocks))


def gaussians(key: bytes, size: int, draws: int) -> NDArray[np.float64]:
    """What the kernel has to add to one tensor of at most one program a chunk, for a sigma of 1."""
    rounds = -(-size // _SMALLEST_CHUNK)
    bits = keystream(key, bytes(12), 0, rounds * _BLOCK * draws)
    j, k = np.frombuffer(bits, dtype="<i8").reshape(-1, 2).T
    radius = np.sqrt(-2 * np.log(np.abs(j.astype(np.float64) + 0.5) * 2.0**-63))
    angle = (k.astype(np.float64) + 0.5) * (np.pi / 2**64)
    sign = np.where(k & 1, -1.0, 1.0) * np.sign(angle)
    pairs = np.stack([radius * np.sin(angle), radius * sign * np.cos(angle)], axis=-1)
    # [round, lane, draw, value] -> [round, value, lane]: neighbouring lanes hold neighbouring values.
    summed: NDArray[np.float64] = pairs.reshape(rounds, _BLOCK, draws, _PER_BLOCK).sum(
        2
    ) / math.sqrt(draws)
    by_lane: NDArray[np.float64] = summed.transpose(0, 2, 1).reshape(-1)
    return by_lane[:size]
