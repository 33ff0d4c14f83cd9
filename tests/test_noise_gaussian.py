"""Bits become the Gaussians of the formula, and the cipher is the one it claims to be."""

import math
import struct

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB, GCM

from clipgrad.noise import keystream
from clipgrad.noise.box_muller import BoxMuller
from clipgrad.noise.keystream import FIRST_BLOCK, KEY_GOOD_FOR, Keystream

DTYPES = [torch.float32, torch.float64]
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
WORD = {torch.float32: 32, torch.float64: 64}


def oracle(radius_word: int, angle_word: int, bits: int) -> tuple[float, float]:
    """The formula, one value after the other, in Python's own float64."""
    u = 0.5 + 2.0**-53 + radius_word * 2.0**-64
    radius = math.sqrt(-2 * math.log(u))
    # The point's angle to the nearer axis, so that neither value loses digits near 0.
    odd = 2 * angle_word + 1
    sine = math.sin(odd * math.pi / 2 ** (bits + 1))
    cosine = math.sin((2**bits - abs(odd)) * math.pi / 2 ** (bits + 1))
    sign = math.copysign(1, odd) * (-1 if angle_word & 1 else 1)
    return radius * sine, radius * sign * cosine


class Given:
    """Hands out bits that a test made up."""

    def __init__(self, radius_words: list[int], angle_words: list[int], dtype: torch.dtype) -> None:
        angles = "<i4" if dtype is torch.float32 else "<i8"
        self._bits = (
            np.array(radius_words, "<i8").tobytes() + np.array(angle_words, angles).tobytes()
        )

    def fill(self, buffer: memoryview, zeros: memoryview) -> None:
        assert len(zeros) == len(self._bits)
        buffer[: len(self._bits)] = self._bits


def transformed(
    radius_words: list[int], angle_words: list[int], dtype: torch.dtype, *, shared: bool = False
) -> torch.Tensor:
    pairs = len(radius_words)
    gaussians = BoxMuller(dtype, 2 * pairs, shared=shared)
    values = gaussians.draw(Given(radius_words, angle_words, dtype), 2 * pairs)
    return values.view(2, pairs).double()


def edge_words(bits: int) -> list[int]:
    top = 2 ** (bits - 1)
    near = [0, 1, 2, 3, 1000, 2**20, top // 2 - 1, top // 2, top // 2 + 1, top - 2, top - 1]
    return sorted({*near, *(-1 - word for word in near)})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_formula(dtype: torch.dtype, shared: bool) -> None:
    """Random words, and every pair of words at an edge: 0, the ends, a quarter turn."""
    bits, random = WORD[dtype], np.random.default_rng(1)
    radius_words = [int(w) for w in random.integers(-(2**63), 2**63 - 1, 20_000)]
    top = 2 ** (bits - 1)
    angle_words = [int(w) for w in random.integers(-top, top - 1, 20_000)]
    for radius_word in edge_words(64):
        for angle_word in edge_words(bits):
            radius_words.append(radius_word)
            angle_words.append(angle_word)
    found = transformed(radius_words, angle_words, dtype, shared=shared)
    pairs = [oracle(j, k, bits) for j, k in zip(radius_words, angle_words, strict=True)]
    expected = torch.tensor(pairs, dtype=torch.float64).T
    error = (found - expected).abs() / expected.abs().clamp(min=1e-300)
    assert error.max() < 8 * EPS[dtype]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_radii_reach_the_far_tail_and_the_centre(dtype: torch.dtype, shared: bool) -> None:
    """With the angle at nearly pi / 2 the first value is the radius."""
    bits = WORD[dtype]
    quarter = 2 ** (bits - 1) - 2
    far = [-(2**63) + step for step in (0, 2**12, 2**14, 2**20, 2**40)]
    near = [2**63 - 2**k for k in (20, 30, 40, 50)]
    radii = transformed(far + near, [quarter] * 9, dtype, shared=shared)[0]
    expected = [oracle(j, quarter, bits)[0] for j in far + near]
    assert torch.allclose(radii, torch.tensor(expected, dtype=torch.float64), rtol=1e-2, atol=2e-8)
    assert radii[0] == pytest.approx(math.sqrt(2 * 53 * math.log(2)))
    assert (radii[:3] > 8).all()
    assert (radii[5:] < 0.02).all()
    assert (radii[6:] > 0).all()
    ends = transformed([2**63 - 1, -(2**63), 2**63 - 512], [quarter] * 3, dtype, shared=shared)
    assert ends.isfinite().all()
    assert ends.abs().max() < 8.6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 999])
def test_any_number_of_values(dtype: torch.dtype, size: int) -> None:
    """An odd number leaves the last value of the last pair out; the layout does not change values."""
    values = BoxMuller(dtype, 1000).draw(Keystream(lambda: bytes(16)), size)
    assert values.shape == (size,)
    pairs, word = (size + 1) // 2, WORD[dtype] // 8
    bits = aes_blocks(bytes(16), FIRST_BLOCK, pairs * (8 + word) // 16 + 1)
    radius_words = struct.unpack(f"<{pairs}q", bits[: 8 * pairs])
    angle_words = struct.unpack(f"<{pairs}{'iq'[word == 8]}", bits[8 * pairs : (8 + word) * pairs])
    found = [oracle(j, k, 8 * word) for j, k in zip(radius_words, angle_words, strict=True)]
    expected = torch.tensor(found, dtype=torch.float64).T.flatten()[:size]
    assert torch.allclose(values.double(), expected, rtol=8 * EPS[dtype], atol=0)


def aes_blocks(key: bytes, first: int, count: int) -> bytes:
    """Counter mode by hand: each counter encrypted by itself."""
    counters = b"".join(number.to_bytes(16, "big") for number in range(first, first + count))
    return Cipher(AES(key), ECB()).encryptor().update(counters)


@pytest.mark.parametrize("mode", [CTR, GCM])
def test_the_keystream_is_aes_in_counter_mode(
    mode: type[CTR | GCM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GCM is made of it, so both modes give the same bytes."""
    monkeypatch.setattr(keystream, "fastest_mode", lambda: mode)
    key = bytes(range(16))
    stream, found = Keystream(lambda: key), b""
    for size in (1, 100, 16, 4096, 7):  # continues within a block
        buffer = bytearray(size + 15)
        stream.fill(memoryview(buffer), memoryview(bytes(size)))
        found += bytes(buffer[:size])
    assert found == aes_blocks(key, FIRST_BLOCK, 300)[: len(found)]
    # FIPS 197, appendix C.1
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    published = bytes.fromhex("69c4e0d86a7b0430d8cdb78070b4c55a")
    assert Cipher(AES(key), ECB()).encryptor().update(block) == published


def test_a_key_that_is_used_up_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEY_GOOD_FOR <= 2**36 - 32  # SP 800-38D, 5.2.1.1: the counter's end
    monkeypatch.setattr(keystream, "KEY_GOOD_FOR", 250)
    keys, found = [bytes([n]) * 16 for n in range(3)], []
    stream = Keystream(iter(keys).__next__)
    for size in (100, 100, 100, 200, 50):  # the third and the fourth do not fit
        buffer = bytearray(size + 15)
        stream.fill(memoryview(buffer), memoryview(bytes(size)))
        found.append(bytes(buffer[:size]))
    streams = [aes_blocks(key, FIRST_BLOCK, 20) for key in keys]
    assert found[0] + found[1] == streams[0][:200]
    assert found[2] == streams[1][:100]
    assert found[3] + found[4] == streams[2][:250]


def test_memory_is_allocated_once() -> None:
    gaussians, stream = BoxMuller(torch.float32, 2**15), Keystream(lambda: bytes(16))
    places = {gaussians.draw(stream, 2**15).data_ptr() for _ in range(3)}
    places |= {gaussians.draw(stream, 2**15).data_ptr() for _ in range(3)}
    assert len(places) == 1
