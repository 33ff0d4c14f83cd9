"""Runs the Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 python -m tests.noise_kernels``."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from clipgrad.kernels import box_muller_kernels as box_muller
from clipgrad.kernels import chacha_kernels as kernels
from clipgrad.kernels import chacha_selftest as selftest
from clipgrad.kernels import device_calls
from clipgrad.kernels.chacha_launch import TritonChaCha
from tests.noise_checks import check_gaussian, check_independent

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
    block = cipher.blocks(selftest.RFC_KEY, selftest.RFC_NONCE, 1)[:64]
    assert block == selftest.RFC_BLOCK  # RFC 8439, 2.3.2
    nonce = bytes.fromhex("000000000000004a00000000")
    stream = cipher.blocks(selftest.RFC_KEY, nonce, 1)
    mixed = bytes(a ^ b for a, b in zip(SUNSCREEN, stream, strict=False))
    assert mixed == CIPHERTEXT  # RFC 8439, 2.4.2
    random = np.random.default_rng(0)
    for first in (7, 2**32 - 128):
        key, nonce = random.bytes(32), random.bytes(12)
        assert cipher.blocks(key, nonce, first) == selftest.keystream(key, nonce, first, 128)


def pairs(cipher: TritonChaCha) -> None:
    """Each float32 value beside float64's of the same bits, to 2^-21: from the far tail to the centre."""
    random, worst = np.random.default_rng(0), 0.0
    for step in range(60):
        words = random.integers(0, 2**32, (selftest.BLOCKS_AT_ONCE, 2), dtype=np.uint32)
        if step % 2:  # u near 0 and near 1 by every power of 2
            near = words[:, 0] >> random.integers(0, 32, selftest.BLOCKS_AT_ONCE, dtype=np.uint32)
            words[:, 0] = np.where(words[:, 1] & 64, near, ~near)
        found = cipher.pairs(words)
        worst = max(worst, selftest.relative_error(found, selftest.pairs_float32(words)))
    assert worst < 2.0**-21
    planted = np.resize(
        np.array([[0, 2], [2**32 - 1, 2**32 - 2]], np.uint32), (selftest.BLOCKS_AT_ONCE, 2)
    )
    far, near = np.abs(cipher.pairs(planted)[:2, 0])
    assert far == np.float32(math.sqrt(106 * math.log(2)))  # 8.57, of u = 2^-53
    assert near == np.float32(2.0**-26)  # of u = 1 - 2^-53
    words = random.integers(0, 2**32, (400_000, 2), dtype=np.uint32)
    values = torch.from_numpy(selftest.pairs_float32(words))  # the formula itself
    check_gaussian(values, 1.0)
    check_independent(values.T)


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
    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 4e-6)]:
        for draws in (1, 3):
            alone = torch.zeros(2100, dtype=dtype)  # programs that are full and others
            cipher.add_gaussian_([alone], 2.0, draws, key)
            expected = 2 * selftest.gaussians(key, 2100, draws, dtype)
            assert np.abs(alone.numpy() - expected).max() < tolerance
    shaped = torch.zeros(21, 10, 10).permute(2, 0, 1).contiguous()
    cipher.add_gaussian_([shaped], 2.0, 3, key)
    assert torch.equal(shaped.view(-1), alone)
    mixed = [torch.zeros(900), torch.zeros(900, dtype=torch.bfloat16), torch.zeros(900)]
    cipher.add_gaussian_(mixed, 1.0, 1, key)
    rows = torch.stack([row.double() for row in mixed])
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 6 / math.sqrt(900)


def means(cipher: TritonChaCha, device: torch.device = CPU) -> None:
    """Divided sums, in place and elsewhere: those of two passes, whatever the divisor, tensor by tensor."""
    key = bytes(range(2, 34))
    divisors = dict.fromkeys([torch.float64, torch.float32], (1.0, 48.0, 64.0))
    divisors |= dict.fromkeys([torch.float16, torch.bfloat16], (48.0,))
    for dtype in divisors:
        sums = [torch.randn(size).to(device, dtype) for size in (1, 0, 7, 2049, 3)]
        added = [total.clone() for total in sums]
        cipher.add_gaussian_(added, 2.0, 1, key)
        drawn_in = torch.float64 if dtype is torch.float64 else torch.float32
        # The interpreter truncates to bfloat16, a device rounds.
        rounding = 2.0**-6 if dtype is torch.bfloat16 and device == CPU else 0.0
        same = partial(torch.testing.assert_close, rtol=rounding, atol=0.0)
        for divisor in divisors[dtype]:
            factor = torch.tensor(1 / divisor, dtype=drawn_in, device=device)
            expected = [(total.to(drawn_in) * factor).to(dtype) for total in added]
            given = [total.clone() for total in sums]
            memory = torch.full((2, 3000), 5.0, dtype=dtype, device=device)
            into = [memory[0, at : at + size] for at, size in [(1, 1), (5, 0), (9, 7), (20, 2049)]]
            into.append(memory[1, 10:13])
            cipher.add_gaussian_(given, 2.0, 1, key, divisor, into)
            same(into, expected)
            assert all(map(torch.equal, given, sums))
            for part in into:
                part.fill_(5.0)
            assert bool((memory == 5.0).all())
            cipher.add_gaussian_(given, 2.0, 1, key, divisor)
            same(given, expected)
    mixed = [torch.randn(90, device=device).to(dtype) for dtype in divisors for _ in range(2)]
    elsewhere = [torch.full_like(total, math.nan) for total in mixed]
    given = [total.clone() for total in mixed]
    cipher.add_gaussian_(mixed, 2.0, 1, key, 48.0, elsewhere)
    cipher.add_gaussian_(given, 2.0, 1, key, 48.0)
    assert all(map(torch.equal, elsewhere, given))


class Asked:
    """Stands where the kernel is, and notes which blocks each launch may use."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def __getitem__(self, grid: tuple[int]) -> Asked:
        self.grid = grid
        return self

    def __call__(self, sources, targets, chunk, first, *numbers):  # type: ignore[no-untyped-def]
        draws, _, per_block, lanes = numbers[7:]
        counts = sources[1::2].tolist()
        assert torch.equal(sources, targets)  # in place
        assert (self.grid, chunk % (per_block * lanes)) == ((len(counts),), 0)
        assert max(counts) <= chunk
        for program, count in enumerate(counts):
            start = first + program * (chunk // per_block) * draws
            rounds = -(-count // (per_block * lanes))
            self.ranges.append((start, start + rounds * lanes * draws))


def counters(cipher: TritonChaCha) -> None:
    """No two programs of a key share a block, and a key that has too few blocks is refused."""
    real, asked = kernels.add_gaussian, Asked()
    kernels.add_gaussian = asked
    try:
        flats = [torch.zeros(n) for n in (5, 3_000_000, 17, 2048 * 2**13)]
        flats += [torch.zeros(n, dtype=torch.float16) for n in (2000, 1)]
        flats += [torch.zeros(n, dtype=torch.float64) for n in (1025, 1)]
        for _ in range(2):  # the second time from a table that is there
            asked.ranges.clear()
            cipher.add_gaussian_(flats, 1.0, 2, bytes(32))
            ranges = sorted(asked.ranges)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
            assert ranges[-1][1] <= 2**32
            assert sum(end - start for start, end in ranges) >= 2 * (3_000_000 + 2048 * 2**13) / 16
        address = (flats[0].data_ptr(),)
        where = (0, torch.float32, address, address, (10_000,))
        with pytest.raises(RuntimeError, match="blocks"):  # else the counter would start again
            cipher._launch(where, bytes(16), 1, bytes(32), 2**32 - 600)
    finally:
        kernels.add_gaussian = real


def capture() -> None:
    """No key is baked into a CUDA graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        total = torch.zeros(5)
        with pytest.raises(RuntimeError, match="outside of the graph"):
            TritonChaCha(torch.device("cuda", 0)).add_gaussian_([total], 1.0, 1, bytes(32))
        assert not total.any()


def tables(cipher: TritonChaCha) -> None:
    """A table serves the addresses and sizes that it holds and no others; those that were used last are kept."""
    memory = torch.zeros(3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_calls, "MOST_TABLES", 8)
        cipher._tables.clear()
        for step in range(10):
            start = step // 2  # the same addresses with other sizes, and others
            parts = [(start, start + 100 + step), (500 - start, 600 - 2 * step)]
            tensors = [memory[start:end] for start, end in parts]
            for again in range(2):
                before = memory.clone()
                cipher.add_gaussian_(tensors, 1.0, 1, bytes([step, again]) * 16)
                changed = torch.zeros(3000, dtype=torch.bool)
                for start, end in parts:
                    changed[start:end] = True
                assert torch.equal(memory != before, changed)
            assert len(cipher._tables) <= 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_calls, "MOST_TABLES", 5)
        cipher._tables.clear()
        few, targets = ([torch.zeros(50) for _ in range(count)] for count in (3, 2))
        for source, target in itertools.product(few, targets):
            cipher.add_gaussian_([source], 1.0, 1, bytes(32), 2.0, [target])
        assert len(cipher._tables) == 5  # not one for each pair
        known = set(cipher._tables)
        for tensor in (*few, torch.zeros(60), torch.zeros(70), *few):
            cipher.add_gaussian_([tensor], 1.0, 1, bytes(32))
            assert len(cipher._tables) == 5
        assert len(known & set(cipher._tables)) == len(few)
    one, other, key = torch.full((100,), 1000.0), torch.full((100,), 2000.0), bytes(range(32))
    first, second = torch.zeros(100), torch.zeros(100)
    for source, target in [(one, first), (other, first), (other, second), (one, second)]:
        cipher.add_gaussian_([source], 1.0, 1, key, 2.0, [target])
        assert bool((target - source / 2).abs().max() < 10)
    double = torch.zeros(100, dtype=torch.float64)
    single = double.view(torch.float32)[:100]  # at the same address, as many
    for target in (double, single):
        double.zero_()
        cipher.add_gaussian_([target], 1.0, 1, key)
        assert bool((target != 0).all())
        assert float(target.abs().max()) < 10


def sabotage(cipher: TritonChaCha) -> None:
    """A cipher that computes anything else does not pass its proof."""

    class Wrong(TritonChaCha):
        def blocks(self, key: bytes, nonce: bytes, first: int) -> bytes:
            return super().blocks(key, nonce, first + 1)

    class Loud(TritonChaCha):
        def add_gaussian_(self, flats, sigma, *others):  # type: ignore[no-untyped-def]
            super().add_gaussian_(flats, 1.001 * sigma, *others)

    class Faint(TritonChaCha):  # float32 only
        def add_gaussian_(self, tensors, sigma, *others):  # type: ignore[no-untyped-def]
            factor = 1 - 2e-6 * (tensors[0].dtype is torch.float32)
            super().add_gaussian_(tensors, factor * sigma, *others)

    class Undivided(TritonChaCha):
        def add_gaussian_(self, tensors, sigma, draws, key, divisor, into):  # type: ignore[no-untyped-def]
            super().add_gaussian_(tensors, sigma, draws, key, 1.0, into)

    class InPlace(TritonChaCha):
        def add_gaussian_(self, tensors, sigma, draws, key, divisor, into):  # type: ignore[no-untyped-def]
            super().add_gaussian_(tensors, sigma, draws, key, divisor)
            torch._foreach_zero_(into)

    for wrong in (Wrong(CPU), Loud(CPU), Faint(CPU), Undivided(CPU), InPlace(CPU)):
        with pytest.raises(RuntimeError, match="the device's"):
            wrong.self_test()
    for name, broken in BROKEN.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(box_muller, name, broken)
            with pytest.raises(RuntimeError, match="Gaussians have a relative error"):
                cipher.self_test()


@triton.jit
def log_of_rounded_u(v):
    """Wrong near u = 1 only, where u as a float32 has no digits left; as hardware logarithms are."""
    return -2.0 * tl.log(tl.where(v < 0, 1.0 + v, v))


@triton.jit
def short_log1p(f):
    """The first terms of the series: right near u = 1, wrong elsewhere."""
    return f * (f * (0.6666667 * f - 1.0) * -1.0 - 2.0)


BROKEN = {"_minus_two_log": log_of_rounded_u, "_minus_two_log1p": short_log1p}


def main() -> None:
    cipher = TritonChaCha(CPU)
    vectors(cipher)
    print("vectors")
    cipher.self_test()
    print("proof")
    pairs(cipher)
    print("pairs")
    tensors(cipher)
    print("tensors")
    means(cipher)
    print("means")
    counters(cipher)
    print("counters")
    capture()
    print("capture")
    tables(cipher)
    print("tables")
    sabotage(cipher)
    print("sabotage")


if __name__ == "__main__":
    main()
