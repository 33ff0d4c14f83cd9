"""Rows of correlated noise that a GPU makes ahead: which, by which kernel, and on which stream."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad.factorisation.strategy import banded
from clipgrad.factorisation.toeplitz import square_root
from clipgrad.noise import SystemNoise, accelerator, rows, streams, sums
from clipgrad.noise.accelerator import AcceleratorNoise
from clipgrad.noise.block import Block, correlate_by_torch
from clipgrad.noise.correlated import CorrelatedNoise
from clipgrad.noise.cpu import CpuNoise
from clipgrad.noise.keys import KeyDeriver
from clipgrad.noise.step_noise import StepSums
from tests.dp_tools import through_a_file
from tests.kernels import interpreted, needs_cuda, needs_triton
from tests.noise_blocks import block_of, check_white, run
from tests.noise_checks import seeded


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter() -> None:
    """The rows of the cipher's values, every place in the ring, many programs, sums, a run with a restart."""
    parts = "proof programs sabotage sums run"
    assert interpreted("tests.correlated_kernels") == parts.split()


class Kernel:
    """Stands for the kernel: its fresh noise is 1, and it notes its calls."""

    wrong = False

    def __init__(self, tail: Any, ahead: int, like: Tensor, draws: int) -> None:
        self.made: list[tuple[tuple[int, int], bytes]] = []
        self.sizes = (list(tail), ahead, like.dtype, draws)

    def self_test(self) -> None:
        if self.wrong:
            raise RuntimeError("other rows")

    def limit(self) -> int:
        return 40

    def make(self, block: Block, columns: tuple[int, int], sigma: float, key: bytes) -> None:
        self.made.append((columns, key))
        part = block._replace(ring=block.ring[:, slice(*columns)])
        part.ring[part.new()] = sigma
        correlate_by_torch(*part)


def accelerated(monkeypatch: pytest.MonkeyPatch, kernel: type[Kernel] = Kernel) -> AcceleratorNoise:
    monkeypatch.setitem(
        sys.modules, "clipgrad.kernels.correlated_launch", SimpleNamespace(TritonRows=kernel)
    )
    monkeypatch.setattr(accelerator, "verified_cipher", lambda device: object())
    key_deriver = KeyDeriver()
    return AcceleratorNoise(torch.device("cpu"), key_deriver, CpuNoise(key_deriver, 1), 3)


def test_an_accelerator_makes_about_half_as_many_rows_as_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = accelerated(monkeypatch)
    for dtype, most in ((torch.float32, 16), (torch.float64, 8)):
        like = torch.zeros(0, dtype=dtype)
        wanted = {0: 1, 1: 1, 2: 1, 3: 2, 7: 4, 15: 8, 31: 16, 63: 16}
        for lags, ahead in wanted.items():
            assert noise.rows_ahead([0.5] * lags, like) == min(ahead, most)


def test_each_part_of_the_columns_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = accelerated(monkeypatch)
    block = block_of(101, 15, 8, 20, 15, torch.float32)
    expected = block._replace(ring=block.ring.clone())
    expected.ring[expected.new()] = 2.0
    correlate_by_torch(*expected)
    for _ in range(2):
        block.ring[block.new()] = math.nan
        assert noise.rows(block, 2.0)
        assert torch.equal(block.ring, expected.ring)
    (kernel,) = noise._rows.values()
    assert isinstance(kernel, Kernel)
    assert kernel.sizes == (block.tail, 8, torch.float32, 3)
    assert [columns for columns, _ in kernel.made] == 2 * [(0, 40), (40, 80), (80, 101)]
    assert len({key for _, key in kernel.made}) == 6


def test_a_kernel_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(Kernel):
        wrong = True

    noise = accelerated(monkeypatch, Wrong)
    block = block_of(10, 15, 8, 0, 0, torch.float32)
    before = block.ring.clone()
    assert not noise.rows(block, 2.0)
    assert torch.equal(block.ring.nan_to_num(), before.nan_to_num())
    assert noise.rows_ahead(block.tail, block.ring) == 1  # each past row is read for each row
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "makes correlated noise without the Triton kernel (RuntimeError: other rows)" in (
        caplog.text
    )


def test_a_device_without_a_cipher_makes_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = accelerated(monkeypatch)
    noise._cipher = None
    assert noise.rows_ahead([0.5] * 15, torch.zeros(0)) == 1
    assert not noise.rows(block_of(10, 15, 1, 0, 0, torch.float32), 1.0)


def test_a_step_on_another_stream_waits_for_rows_made_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.waited = name, []  # type: ignore[var-annotated]

        def wait_stream(self, other: Stream) -> None:
            self.waited.append(other.name)

    recorded: list[str] = []
    one, other = Stream("one"), Stream("other")
    ring: Any = SimpleNamespace(
        device=torch.device("cuda", 0), record_stream=lambda stream: recorded.append(stream.name)
    )
    capturing = False
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    order = streams.InOrder(ring)
    for stream in (one, one, other, other, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: stream)
        order.enter()
    assert (one.waited, other.waited, recorded) == (["other"], ["one"], ["other", "one"])
    capturing = True
    with pytest.raises(RuntimeError, match="each replay of the graph would add the same noise"):
        order.enter()


def test_each_step_enters_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the steps that only use a row made before: they would be replayed, too."""
    noise = CorrelatedNoise(SystemNoise(), banded(square_root(5)), "5-banded")
    run(noise, range(2), [(4,)])

    def refuse(self: Any) -> None:
        raise RuntimeError("captured")

    monkeypatch.setattr(streams.InOrder, "enter", refuse)
    with pytest.raises(RuntimeError, match="captured"):
        run(noise, range(2, 3), [(4,)])


@pytest.mark.parametrize("in_place", [True, False])
def test_sums_without_plain_memory_are_added_by_pytorch(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channels_last sum has its values in another order, but noise belongs to coordinates."""
    asked = []

    class Adds:
        def add(self, given: Any, noise: Any, divisor: float, into: Any) -> None:
            asked.append(len(given))
            for total, row, result in zip(given, noise, into, strict=True):
                result.copy_((total + row) / divisor)

    monkeypatch.setattr(sums, "_kernel_for", lambda given: Adds())
    plain = torch.arange(24.0).view(2, 3, 2, 2)
    turned = plain.clone().to(memory_format=torch.channels_last)
    noise = torch.arange(24.0).flip(0).view(2, 3, 2, 2)
    for given in ([plain.clone()], [turned], [torch._neg_view(-plain)]):
        before = given[0].clone()
        version = given[0]._version
        (found,) = sums.noised(given, [noise], 4.0, in_place=in_place)
        assert torch.equal(found, (before + noise) / 4.0)
        assert (found is given[0]) == in_place
        assert (given[0]._version > version) == in_place
        assert found.stride() == before.stride()
        assert in_place or torch.equal(given[0], before)
    assert asked == [1]


@pytest.mark.cuda
@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bands", [2, 16, 40])
def test_correlated_noise_on_cuda(dtype: torch.dtype, bands: int) -> None:
    column, size = square_root(bands), 20_000
    source = SystemNoise()
    noise = CorrelatedNoise(source, banded(column), "banded")
    shapes = [(size // 2,), (100, size // 200)]
    found = run(noise, range(9), shapes, dtype=dtype, device="cuda")
    (kept,) = noise._rows.values()
    assert isinstance(kept, rows.Rows)
    assert kept._ahead > 1 or bands == 2
    again = CorrelatedNoise(SystemNoise(), banded(column), "banded")
    again.load_state_dict(through_a_file(noise.state_dict()))
    found = torch.cat([found, run(again, range(9, 64), shapes, dtype=dtype, device="cuda")])
    check_white(found, column)


@pytest.mark.cuda
@needs_cuda
def test_a_capture_refuses_rows_made_before() -> None:
    noise = CorrelatedNoise(SystemNoise(), banded(square_root(16)), "banded")
    run(noise, range(2), [(100,)], device="cuda")
    total = torch.zeros(100, device="cuda")

    def captured() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            total.zero_()  # PyTorch warns of a graph that holds nothing
            noise.next(StepSums([total], 2, ["0"], sigma=1.0, divisor=2.0, in_place=True))

    with pytest.raises(RuntimeError, match="outside of the graph"):
        captured()


@pytest.mark.cuda
@needs_cuda
def test_steps_on_several_streams() -> None:
    column, size = square_root(16), 2_000_000
    noise = CorrelatedNoise(SystemNoise(), banded(column), "banded")
    every = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for t in range(20):
        with torch.cuda.stream(every[t % 3]):
            found.append(run(noise, range(t, t + 1), [(size,)], device="cuda")[0, ::100])
    torch.cuda.synchronize()
    check_white(torch.stack(found), column)


def test_a_seeded_source_makes_one_row_at_a_time() -> None:
    """A seeded source may be repeated step by step, so nothing is drawn ahead."""
    noise = CorrelatedNoise(seeded(), banded(square_root(4)), "banded")
    run(noise, range(2), [(4,)])
    (kept,) = noise._rows.values()
    assert isinstance(kept, rows.Rows)
    assert kept._ahead == 1
