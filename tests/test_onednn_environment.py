"""A variable of the environment lets oneDNN round on the CPU, which PyTorch's settings cannot forbid."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from clipgrad.kernels.float32_precision import FULL, precision, precisions, rounds, set_precision
from tests.cancelling_losses import MANY, PLANTED
from tests.float32_settings import all_reads, own_settings, setting
from tests.test_low_precision import ORDINARY, contributions, needs_bfloat16

NAMES = ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "expected"),
    [("BF16", "bf16"), ("any", "bf16"), ("F16", "tf32"), ("TF32", "tf32"), ("STRICT", "ieee")],
)
def test_the_variable_is_read(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with setting("ieee"):
        before = all_reads(), own_settings()
        assert precisions("cpu") == (expected,) * 3
        assert rounds(torch.zeros(1)) is (expected != FULL)
        with set_precision("cpu", FULL):
            assert precision("cpu") == FULL
            assert torch.backends.mkldnn.enabled is (expected == FULL)
        assert torch.backends.mkldnn.enabled
        assert (all_reads(), own_settings()) == before


def test_onednn_stays_off(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: torch._C._set_mkldnn_enabled(True))
    torch._C._set_mkldnn_enabled(False)
    for wanted in (FULL, "tf32"):
        with set_precision("cpu", wanted):
            assert not torch.backends.mkldnn.enabled
        assert not torch.backends.mkldnn.enabled


def test_the_first_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("STRICT", "BF16"), strict=True):
        monkeypatch.setenv(name, value)
    assert precision("cpu") == FULL


@needs_bfloat16
@pytest.mark.parametrize("name", NAMES)
def test_norms_and_sums_are_full(name: str) -> None:
    """In a process of its own, since oneDNN reads the variable once."""
    environment = {**os.environ, name: "BF16"}
    command = [sys.executable, "-m", "tests.test_onednn_environment"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr


def _convolution_error() -> float:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((4, 16, 24, 24), (32, 16, 3, 3)))
    exact = F.conv2d(x.double(), w.double())
    return float((F.conv2d(x, w) - exact).norm() / exact.norm())


def check() -> None:
    """Fail unless oneDNN rounds a convolution, and neither norms nor sums; PyTorch's settings do not help."""
    for name in ("default", "ieee", "medium"):
        with setting(name):
            assert _convolution_error() > 1e-3
            with set_precision("cpu", FULL):
                assert _convolution_error() < 1e-5
            assert _convolution_error() > 1e-3
            for planted in PLANTED:
                found, _ = contributions(planted, 0.0, "ghost")
                assert found.max() <= 1 + ORDINARY
            for model in MANY.values():
                found, _ = contributions(model, 0.0, "ghost")
                assert abs(found.max() - 1) <= ORDINARY


if __name__ == "__main__":
    check()
