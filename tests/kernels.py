"""What tests of Triton kernels share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def interpreted(module: str) -> list[str]:
    """Run a module of checks in Triton's interpreter; the names of those that passed, as it prints them.

    In a process of its own: whether to interpret is decided when Triton is imported.
    """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()
