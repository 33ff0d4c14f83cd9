"""Runs the Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 python -m tests.noise_kernels``."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from clipgrad.noise import _chacha_kernels as kernels
from clipgrad.noise import _chacha_triton as chacha
from clipgrad.noise._chacha_triton import TritonChaCha
from tests.noise_checks import check_gaussian

CPU = torch.device("cpu")
SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
CIPHERTEXT = bytes.fromhex(
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
    "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
    "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
    "5af90bbf74a35be6b40b8eedf2785e42874d"
)


def vectors(cipher: TritonChaCha) -> None:
    block = cipher.blocks(chacha.RFC_KEY, chacha.RFC_NONCE, 1)[:64]
    assert block == chacha.RFC_BLOCK  # RFC 8439, 2.3.2
    nonce = bytes.fromhex("000000000000004a00000000")
    stream = cipher.blocks(chacha.RFC_KEY, nonce, 1)
    mixed = bytes(a ^ b for a, b in zip(SUNSCREEN, stream, strict=False))
    assert mixed == CIPHERTEXT  # RFC 8439, 2.4.2
    random = np.random.default_rng(0)
    for first in (7, 2**32 - 128):
        key, nonce = random.bytes(32), random.bytes(12)
        assert cipher.blocks(key, nonce, first) == chacha.keystream(key, nonce, first, 128)


def tensors(cipher: TritonChaCha) -> None:
    """Many tensors in one call: each value once, nothing beside them, the right size."""
    key = bytes(range(1, 33))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        sizes = (1, 0, 7, 1025, 3) if dtype is torch.float64 else (700, 800)
        memory = torch.full((sum(sizes) + 2 * len(sizes),), 5.0, dtype=dtype)
        flats, at = [], 1
        for size in sizes:
            flats.append(memory[at : at + size])
            at += size + 2
        cipher.add_gaussian_(flats, 2.0, 1, key)
        noise = torch.cat(flats).double() - 5
        check_gaussian(noise, 2.0)
        check_gaussian(noise[: len(noise) // 2], 2.0)
        inside = sum(int((flat == 5.0).sum()) for flat in flats)
        assert int((memory == 5.0).sum()) == 2 * len(sizes) + inside
        if dtype is torch.float64:
            assert len(noise.unique()) == len(noise)
    draws = 3
    alone = torch.zeros(1025, dtype=torch.float64)
    cipher.add_gaussian_([alone], 2.0, draws, key)
    assert np.abs(alone.numpy() - 2 * chacha.gaussians(key, 1025, draws)).max() < 1e-11
    mixed = [torch.zeros(900), torch.zeros(900, dtype=torch.bfloat16), torch.zeros(900)]
    cipher.add_gaussian_(mixed, 1.0, 1, key)
    rows = torch.stack([row.double() for row in mixed])
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 6 / math.sqrt(900)


class Asked:
    """Stands where the kernel is, and notes which blocks each launch may use."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def __getitem__(self, grid: tuple[int]) -> Asked:
        self.grid = grid
        return self

    def __call__(self, table, chunk, first, *key, DRAWS, TYPE, BLOCK):  # type: ignore[no-untyped-def]
        counts = table[2::2].tolist()
        assert max(counts) <= chunk
        first %= 2**32
        for program, count in enumerate(counts):
            start = first + program * (chunk // 8) * DRAWS
            rounds = -(-count // (8 * BLOCK))
            self.ranges.append((start, start + rounds * BLOCK * DRAWS))


def counters(cipher: TritonChaCha) -> None:
    """No two programs of a key share a block, and a key that has too few blocks is refused."""
    real, asked = kernels.add_gaussian, Asked()
    kernels.add_gaussian = asked
    try:
        flats = [torch.zeros(n) for n in (5, 3_000_000, 17, 1024 * 2**13)]
        flats += [torch.zeros(n, dtype=torch.float16) for n in (2000, 1)]
        cipher.add_gaussian_(flats, 1.0, 2, bytes(32))
        ranges = sorted(asked.ranges)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert ranges[-1][1] <= 2**32
        with pytest.raises(RuntimeError, match="blocks"):  # else the counter would start again
            cipher._launch([torch.zeros(10_000)], 1.0, 1, bytes(32), 2**32 - 1000)
    finally:
        kernels.add_gaussian = real


def sabotage(cipher: TritonChaCha) -> None:
    """A cipher that computes anything else does not pass its proof."""

    class Wrong(TritonChaCha):
        def blocks(self, key: bytes, nonce: bytes, first: int) -> bytes:
            return super().blocks(key, nonce, first + 1)

    class Loud(TritonChaCha):
        def add_gaussian_(self, flats, sigma, draws, key):  # type: ignore[no-untyped-def]
            super().add_gaussian_(flats, 1.001 * sigma, draws, key)

    for wrong in (Wrong(CPU), Loud(CPU)):
        with pytest.raises(RuntimeError, match="the device's"):
            wrong.prove()


def main() -> None:
    cipher = TritonChaCha(CPU)
    vectors(cipher)
    print("vectors")
    cipher.prove()
    print("proof")
    tensors(cipher)
    print("tensors")
    counters(cipher)
    print("counters")
    sabotage(cipher)
    print("sabotage")


if __name__ == "__main__":
    main()
