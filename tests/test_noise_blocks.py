"""Blocks of rows of correlated noise without the loop in C, by products in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from benchmarks import correlated as benchmark
from clipgrad.factorisation.optimise import optimised
from clipgrad.factorisation.strategy import banded
from clipgrad.noise import SystemNoise, rows
from clipgrad.noise.block import Block, correlate, correlate_by_torch
from clipgrad.noise.correlated import CorrelatedNoise
from tests.dp_tools import through_a_file
from tests.float32_settings import setting
from tests.noise_blocks import block_of, check_white, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def check(block: Block) -> None:
    expected = block._replace(ring=block.ring.double())
    correlate_by_torch(*expected)
    before = block.ring.clone()
    correlate(block)
    error = (block.ring.double() - expected.ring)[block.new()].abs().max()
    assert error <= TOLERANCE[block.ring.dtype]
    others = [index for index in range(len(before)) if index not in block.new()]
    assert torch.equal(block.ring[others].nan_to_num(), before[others].nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("lags", "ahead"), [(15, 15), (15, 1), (3, 8), (1, 1), (20, 16)])
def test_products_are_the_recurrence(dtype: torch.dtype, lags: int, ahead: int) -> None:
    """At every place in the ring, and in the first steps, which have fewer past rows."""
    for first in range(lags + ahead):
        for known in sorted({0, 1, lags - 1, lags} if first % 4 == 0 else {lags}):
            check(block_of(70, lags, ahead, first, known, dtype))
    check(block_of(2 * 2048 + 3, lags, ahead, 1, lags, dtype))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "low matmul precision": lambda: setting("medium"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to half": lambda: torch.autocast("cpu", torch.float16),
    "float16 by default": lambda: _default_dtype(torch.float16),
    "another default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "grad mode": torch.enable_grad,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_settings_of_the_user_change_nothing(setting: str, dtype: torch.dtype) -> None:
    block = block_of(600, 15, 15, 20, 15, dtype)
    with SETTINGS[setting]():  # type: ignore[no-untyped-call]
        check(block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("saved_after", [0, 7, 20])
def test_noise_without_the_loop_in_c(
    dtype: torch.dtype, saved_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tensors; a restart in the middle of a block continues the past rows, and draws anew."""
    monkeypatch.setattr(rows, "compiled_loops", lambda: None)
    column, shapes = optimised(6, 64), [(30, 40), (), (0, 3), (777,)]
    noise = CorrelatedNoise(SystemNoise(), banded(column), "6-banded")
    found = []
    if saved_after:
        found.append(run(noise, range(saved_after), shapes, dtype=dtype))
        again = CorrelatedNoise(SystemNoise(), banded(column), "6-banded")
        again.load_state_dict(through_a_file(noise.state_dict()))
        noise = again
    found.append(run(noise, range(saved_after, 32), shapes, dtype=dtype))
    check_white(torch.cat(found), column)


def test_the_benchmark_names_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark.main(
            [
                "--only",
                "times",
                "--device",
                "cpu",
                "--cases",
                "1e4",
                "--rounds",
                "1",
                "--bands",
                "3",
            ]
        )
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("cpu, 1 threads")
        assert lines[2].split()[0] == "1e4"
        assert len(lines) == 3
        if not torch.cuda.is_available():
            with pytest.raises(SystemExit):
                benchmark.main(["--device", "cuda"])
            assert "needs a CUDA device" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
