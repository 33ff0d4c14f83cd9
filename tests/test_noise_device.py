"""ChaCha20 on the device, its proof, and what takes its place. Kernels run in Triton's interpreter, in a process
of their own: whether to interpret is decided when Triton is imported."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from clipgrad.noise import SystemNoise, _accelerator
from clipgrad.noise._accelerator import AcceleratorNoise, proved_cipher
from clipgrad.noise._cpu import CpuNoise
from clipgrad.noise._keys import Lineage
from tests.noise_checks import check_gaussian

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter() -> None:
    """RFC 8439, ``cryptography``'s ChaCha20, the Gaussians, many tensors of all dtypes, draws."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.noise_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["vectors", "proof", "tensors", "counters", "sabotage"]


def fallback(draws: int = 1) -> AcceleratorNoise:
    lineage = Lineage()
    return AcceleratorNoise(torch.device("cpu"), lineage, CpuNoise(lineage, draws), draws)


def test_noise_made_on_the_cpu_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_accelerator, "_COPIED_AT_A_TIME", 50_000)
    totals = [torch.zeros(120_000), torch.zeros(7), torch.zeros(90_001, dtype=torch.bfloat16)]
    fallback().add(totals, 2.0)
    check_gaussian(torch.cat(totals), 2.0)
    total = torch.zeros(100_000, dtype=torch.float64)
    fallback(draws=4).add([total], 0.5)
    check_gaussian(total, 0.5)


def test_other_devices_and_broken_ones_are_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_accelerator, "_told", set())
    for device in ("mps", "mps", "xpu:1"):
        assert proved_cipher(torch.device(device)) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert {record.name for record in caplog.records} == {"clipgrad"}
    assert "Noise for mps is made on the CPU" in caplog.text


def test_a_missing_triton_means_the_cpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_accelerator, "_told", set())
    monkeypatch.setitem(sys.modules, "clipgrad.noise._chacha_triton", None)
    assert proved_cipher(torch.device("cuda", 0)) is None
    assert "ModuleNotFoundError" in caplog.text


def test_a_cipher_that_proves_wrong_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, device: torch.device) -> None: ...

        def prove(self) -> None:
            raise RuntimeError("fails the test vector")

    monkeypatch.setattr(_accelerator, "_told", set())
    module = SimpleNamespace(TritonChaCha=Broken)
    monkeypatch.setitem(sys.modules, "clipgrad.noise._chacha_triton", module)
    assert proved_cipher(torch.device("cuda", 0)) is None
    assert "fails the test vector" in caplog.text


@pytest.mark.cuda
@needs_cuda
@needs_triton
def test_the_device_proves_its_cipher() -> None:
    assert proved_cipher(torch.device("cuda", 0)) is not None


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_noise_on_cuda(dtype: torch.dtype, draws: int) -> None:
    source, rows = SystemNoise(draws=draws), []
    state = torch.cuda.get_rng_state()
    for _ in range(2):
        totals = [torch.zeros(3_000_000, device="cuda", dtype=dtype) for _ in range(2)]
        small = [torch.zeros(size, device="cuda", dtype=dtype) for size in (0, 1, 5, 1024, 1025)]
        source.add_gaussian_([*totals, *small], 2.0)
        for total in totals:
            check_gaussian(total, 2.0)
        assert all(bool((total != 0).all()) for total in small)
        rows += totals
    correlation = torch.corrcoef(torch.stack(rows).double()) - torch.eye(4, device="cuda")
    assert float(correlation.abs().max()) < 8 / math.sqrt(3e6)
    assert torch.equal(torch.cuda.get_rng_state(), state)  # nothing of Philox
