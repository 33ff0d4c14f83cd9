"""Runs the kernels for correlated noise in Triton's interpreter.

``TRITON_INTERPRET=1 python -m tests.correlated_kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from clipgrad.factorisation.strategy import banded
from clipgrad.factorisation.toeplitz import square_root
from clipgrad.kernels import chacha_selftest as selftest
from clipgrad.kernels import correlated_kernels as kernels
from clipgrad.kernels import correlated_launch as launch
from clipgrad.kernels import device_calls
from clipgrad.kernels.chacha_launch import TritonChaCha
from clipgrad.kernels.correlated_launch import TritonRows, TritonSums
from clipgrad.noise import SystemNoise, accelerator, rows, sums, system
from clipgrad.noise.block import Block, correlate_by_torch
from clipgrad.noise.correlated import CorrelatedNoise
from tests.factorisation.oracle import matrix
from tests.noise_blocks import check_white, run

CPU = torch.device("cpu")


def kernel(
    bands: int, ahead: int, dtype: torch.dtype = torch.float32, draws: int = 1
) -> TritonRows:
    return TritonRows(square_root(bands)[1:].tolist(), ahead, torch.zeros(0, dtype=dtype), draws)


def proof() -> None:
    for arguments in (
        (16, 8),
        (2, 1),
        (41, 16),
        (16, 8, torch.float64),
        (4, 2, torch.float64, 2),
    ):
        kernel(*arguments).self_test()


def programs() -> None:
    """Several programs of several rounds, every place in the ring, and two ranges of columns."""
    made = kernel(4, 2)
    size = 3 * 8 * selftest.BLOCKS_AT_ONCE + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_ENOUGH_PROGRAMS", 2)
        fresh = made._fresh(size).float()
        assert len(fresh.unique()) > 0.999 * fresh.numel()
        for first, known in [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3), (1, 3)]:
            ring = torch.randn(5, size + 7)
            block = Block(ring, made._tail[:3].tolist(), first, 2, known)
            expected = block._replace(ring=ring.clone())
            expected.ring[expected.new(), 3:-4] = fresh
            correlate_by_torch(expected.ring[:, 3:-4], *expected[1:])
            made.make(block, (3, size + 3), 3.0, selftest.RFC_KEY)
            assert (ring - expected.ring).abs().max() < 2e-5
        made.make(block, (5, 5), 3.0, selftest.RFC_KEY)  # nothing
    long = block._replace(ring=torch.empty(5, 2**36, device="meta"))
    with pytest.raises(RuntimeError, match="One key makes"):  # else the counter would start again
        made.make(long, (0, 2**36), 1.0, bytes(32))
    assert made.limit() == 2**33
    assert kernel(16, 8, draws=4).limit() == 2**29


@triton.jit
def forgets(rows, earlier, weights, first: tl.constexpr, AHEAD: tl.constexpr):
    return rows


@triton.jit
def keeps_apart(rows, tail, AHEAD: tl.constexpr):
    return rows


@triton.jit
def takes_the_first(values, first: tl.constexpr, COUNT: tl.constexpr):
    part = (values[0],)
    for i in tl.static_range(1, COUNT):
        part = part + (values[i],)  # noqa: RUF005
    return part


BROKEN = {"_minus": forgets, "_minus_each_other": keeps_apart, "_some": takes_the_first}


def sabotage() -> None:
    """A kernel that computes anything else does not pass its proof."""
    for name, broken in BROKEN.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, name, broken)
            with pytest.raises(RuntimeError, match="other rows of correlated noise"):
                kernel(4, 2).self_test()

    class Loud(TritonRows):
        def make(self, block: Any, columns: tuple[int, int], sigma: float, key: bytes) -> None:
            super().make(block, columns, 1.001 * sigma, key)

    class Early(TritonRows):
        def make(self, block: Any, columns: tuple[int, int], sigma: float, key: bytes) -> None:
            known = max(0, block.known - 1)
            super().make(launch._Tested(block.ring, block.first, 2, known), columns, sigma, key)

    for wrong in (Loud, Early):
        with pytest.raises(RuntimeError, match="other rows of correlated noise"):
            wrong([0.5, 0.25], 2, torch.zeros(0), 1).self_test()

    class Undivided(TritonSums):
        def add(self, given: Any, noise: Any, divisor: float, into: Any) -> None:
            super().add(given, noise, 1.0, into)

    with pytest.raises(RuntimeError, match="adds a row of noise to sums wrongly"):
        Undivided(CPU).self_test()


def sums_of_each_dtype() -> None:
    """In place and elsewhere, those of two operations; nothing beside them is written."""
    adder = TritonSums(CPU)
    adder.self_test()
    sizes = [1, 0, 7, 2**14 + 5, 3, 300]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_calls, "MOST_TABLES", 8)
        for noise_dtype, dtypes in (
            (torch.float32, [torch.float32, torch.float16]),
            (torch.float64, [torch.float64]),
        ):
            for turn in range(12):
                row = torch.randn(sum(sizes), dtype=noise_dtype)
                noise = list(row.split(sizes))
                given = [torch.randn(n).to(dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
                factor = torch.tensor(1 / 48.0, dtype=noise_dtype)
                added = [
                    (g.to(noise_dtype) + n).to(g.dtype) for g, n in zip(given, noise, strict=True)
                ]
                expected = [(a.to(noise_dtype) * factor).to(a.dtype) for a in added]
                memory = [torch.full((len(g) + 2,), 5.0, dtype=g.dtype) for g in given]
                into = given if turn % 2 else [m[1:-1] for m in memory]
                before = [g.clone() for g in given]
                adder.add(given, noise, 48.0, into)
                assert all(map(torch.equal, into, expected))
                assert turn % 2 or all(map(torch.equal, given, before))
                assert all(m[0] == m[-1] == 5.0 for m in memory)
            assert len(adder._tables) <= 8


def of_accelerator(name: str) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any) -> Any:
        return getattr(self._accelerator(CPU), name)(*arguments)

    return call


def whole_runs() -> None:
    """Noise of whole runs is white once the correlation is undone, also after a restart within a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "verified_cipher", TritonChaCha)
        patch.setattr(rows, "compiled_loops", lambda: None)
        patch.setattr(sums, "_kernel_for", lambda given: TritonSums(CPU))
        for name in ("rows", "rows_ahead"):  # which the CPU of a process does itself
            patch.setattr(system._ProcessNoise, name, of_accelerator(name))
        column, shapes, steps = square_root(4), [(300,), (), (20, 35)], 5
        noise = CorrelatedNoise(SystemNoise(), banded(column), "4-banded")
        before = run(noise, range(steps), shapes)
        (kept,) = noise._rows.values()
        assert isinstance(kept, rows.Rows)
        assert (kept._ahead, kept._left) == (2, 1)
        state, ways = noise.state_dict(), []
        assert torch.equal(state["past"]["0"][-1], kept.past()[-1][:300])
        for _ in range(2):
            again = CorrelatedNoise(SystemNoise(), banded(column), "4-banded")
            again.load_state_dict(state)
            ways.append(torch.cat([before, run(again, range(steps, 2 * steps), shapes)]))
            check_white(ways[-1], column)
        one, other = (torch.from_numpy(matrix(column, 2 * steps)) @ way for way in ways)
        assert torch.equal(one[:steps], other[:steps])
        assert (one * other)[steps:].mean(1).abs().max() < 8 / math.sqrt(one.shape[1])


PARTS: dict[str, Callable[[], None]] = {
    "proof": proof,
    "programs": programs,
    "sabotage": sabotage,
    "sums": sums_of_each_dtype,
    "run": whole_runs,
}


def main() -> None:
    for name, part in PARTS.items():
        part()
        print(name, flush=True)


if __name__ == "__main__":
    main()
