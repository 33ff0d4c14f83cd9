"""ChaCha20 on the device, its proof, and what takes its place. Kernels run in Triton's interpreter, in a process
of their own: whether to interpret is decided when Triton is imported."""

from __future__ import annotations

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import scipy.stats
import torch

from clipgrad.noise import SystemNoise, accelerator, keys
from clipgrad.noise.accelerator import AcceleratorNoise, verified_cipher
from clipgrad.noise.cpu import CpuNoise
from clipgrad.noise.keys import KeyDeriver
from tests.kernels import interpreted, needs_cuda, needs_triton
from tests.noise_checks import check_gaussian


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter() -> None:
    """RFC 8439, ``cryptography``'s ChaCha20, the Gaussians, many tensors of all dtypes, draws."""
    parts = "vectors proof pairs tensors means counters capture tables sabotage"
    assert interpreted("tests.noise_kernels") == parts.split()


def fallback(draws: int = 1) -> AcceleratorNoise:
    key_deriver = KeyDeriver()
    return AcceleratorNoise(torch.device("cpu"), key_deriver, CpuNoise(key_deriver, draws), draws)


def test_noise_made_on_the_cpu_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_COPIED_AT_A_TIME", 50_000)
    totals = [torch.zeros(120_000), torch.zeros(7), torch.zeros(90_001, dtype=torch.bfloat16)]
    fallback().add(totals, 2.0)
    check_gaussian(torch.cat(totals), 2.0)
    totals = [torch.full((120_000,), 1000.0), torch.full((300, 200), 2000.0, dtype=torch.float16)]
    means = [torch.empty_like(total) for total in totals]
    fallback().add(totals, 2.0, 5.0, means)
    check_gaussian(5 * means[0] - 1000, 2.0)
    assert means[1].shape == (300, 200)
    assert abs(float(means[1].double().mean()) - 400) < 0.1
    total = torch.zeros(100_000, dtype=torch.float64)
    fallback(draws=4).add([total], 0.5)
    check_gaussian(total, 0.5)


def test_other_devices_and_broken_ones_are_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "_warned_devices", set())
    for device in ("mps", "mps", "xpu:1"):
        assert verified_cipher(torch.device(device)) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert {record.name for record in caplog.records} == {"clipgrad"}
    assert "Noise for mps is made on the CPU" in caplog.text


def test_a_missing_triton_means_the_cpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "_warned_devices", set())
    monkeypatch.setitem(sys.modules, "clipgrad.kernels.chacha_launch", None)
    assert verified_cipher(torch.device("cuda", 0)) is None
    assert "ModuleNotFoundError" in caplog.text


def test_a_cipher_that_proves_wrong_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, device: torch.device) -> None: ...

        def self_test(self) -> None:
            raise RuntimeError("fails the test vector")

    monkeypatch.setattr(accelerator, "_warned_devices", set())
    module = SimpleNamespace(TritonChaCha=Broken)
    monkeypatch.setitem(sys.modules, "clipgrad.kernels.chacha_launch", module)
    assert verified_cipher(torch.device("cuda", 0)) is None
    assert "fails the test vector" in caplog.text


@pytest.mark.cuda
@needs_cuda
@needs_triton
def test_the_device_proves_its_cipher() -> None:
    assert verified_cipher(torch.device("cuda", 0)) is not None


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


@pytest.mark.cuda
@needs_cuda
@needs_triton
def test_every_pair_on_cuda_is_that_of_its_bits() -> None:
    """A million pairs beside float64's: the compiled arithmetic, which the interpreter does not run."""
    from clipgrad.kernels import chacha_selftest as selftest
    from clipgrad.kernels.chacha_launch import TritonChaCha

    cipher = TritonChaCha(torch.device("cuda", 0))
    key, size = bytes(range(32)), 2_000_003
    for dtype, tolerance in [(torch.float32, 2.0**-21), (torch.float64, 1e-9)]:
        found = torch.zeros(size, dtype=dtype, device="cuda")
        cipher.add_gaussian_([found], 1.0, 1, key)
        expected = selftest.gaussians(key, size, 1, dtype)
        assert selftest.relative_error(found.cpu().numpy(), expected) < tolerance


@pytest.mark.cuda
@needs_cuda
@needs_triton
def test_means_on_cuda() -> None:
    """Bit for bit what two passes give."""
    from clipgrad.kernels.chacha_launch import TritonChaCha
    from tests.noise_kernels import means

    device = torch.device("cuda", 0)
    means(TritonChaCha(device), device)


@pytest.mark.cuda
@needs_cuda
@needs_triton
def test_a_hundred_million_values_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments, Kolmogorov and Smirnov, Pearson, tails, neighbours: tests/test_noise_statistics.py on the device."""
    monkeypatch.setattr(keys, "new_master", lambda: bytes(range(32)))
    source, n, edge = SystemNoise(), 0, 8.0
    bins = torch.zeros(8192, dtype=torch.int64, device="cuda")
    powers = torch.zeros(4, dtype=torch.float64, device="cuda")
    lagged = torch.zeros(2, 3, dtype=torch.float64, device="cuda")
    beyond = dict.fromkeys((4.0, 5.0, 6.0), 0)
    before = torch.zeros(10_000_000, device="cuda")
    for _ in range(10):
        x = torch.zeros(10_000_000, device="cuda")
        source.add_gaussian_([x], 0.75)
        x /= 0.75
        n += x.numel()
        powers += torch.stack([x.double().pow(power).sum() for power in (1, 2, 3, 4)])
        at = ((x + edge) * 512).floor_().clamp_(0, len(bins) - 1).long()
        bins += torch.bincount(at, minlength=len(bins))
        for bound in beyond:
            beyond[bound] += int((x.abs() > bound).sum())
        for row, (one, other) in enumerate([(x, before), (x * x - 1, before * before - 1)]):
            # Pairs lie 128 values apart, a lane's 2048 on.
            products = [one[1:] * one[:-1], one[128:] * one[:-128], one * other]
            lagged[row] += torch.stack([product.double().sum() for product in products])
        before = x
    check_moments((powers / n).tolist(), n)
    edges = torch.arange(1, len(bins)).double() / 512 - edge
    below = bins.cpu().cumsum(0)[:-1].double() / n
    exact = torch.from_numpy(scipy.stats.norm.cdf(edges.numpy()))
    distance = float((below - exact).abs().max())
    assert scipy.stats.kstwobign.sf(distance * math.sqrt(n)) > 1e-6
    for bound, count in beyond.items():
        expected = 2 * float(scipy.stats.norm.sf(bound))
        assert scipy.stats.binomtest(count, n, expected).pvalue > 1e-6
    errors = lagged / torch.tensor([[n], [4 * n]], device="cuda").double().sqrt()
    assert float(errors.abs().max()) < 5


def check_moments(raw: list[float], n: int) -> None:
    """Five standard errors of mean, variance, third and fourth moment: Var of x^k is (2k - 1)!! less the square."""
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(raw[power - 1] - moment) < 5 * math.sqrt(variance / n)


@pytest.mark.cuda
@needs_cuda
@needs_triton
@pytest.mark.filterwarnings(
    "ignore:The CUDA Graph is empty"
)  # nothing was captured before it raised
def test_a_cuda_graph_cannot_hold_noise() -> None:
    """Each replay would add the same."""
    source, total = SystemNoise(), torch.zeros(1000, device="cuda")
    source.add_gaussian_([total], 1.0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="outside of the graph"), torch.cuda.graph(graph):
        source.add_gaussian_([total], 1.0)


@pytest.mark.cuda
@needs_cuda
@needs_triton
def test_tables_on_two_streams() -> None:
    """Fresh memory on either stream each time: a table that is still read must not become somebody else's memory."""
    source, side = SystemNoise(), torch.cuda.Stream()
    for step in range(30):
        for stream in (torch.cuda.current_stream(), side):
            with torch.cuda.stream(stream):
                totals = [torch.zeros(1000 + step, device="cuda") for _ in range(50)]
                source.add_gaussian_(totals, 1.0)
                check_gaussian(torch.cat(totals), 1.0)
                del totals
