"""Where a row was measured: what a reader needs to judge it, and to measure it again."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "clipgrad", "opacus", "opake", "backpack-for-pytorch", "triton", "numpy")


def environment(device: str) -> dict[str, str]:
    """Facts by name, in the order in which a report prints them."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _version(package))},
        "commit": _commit(),
        "allocator": _allocator(device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["float32 matmul"] = torch.get_float32_matmul_precision()
        facts["host"] = f"{cpu_name()}, {os.cpu_count()} cores"
    return facts


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def _allocator(device: str) -> str:
    if device == "cuda":
        return os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "CUDA caching allocator, defaults"
    preloaded = os.environ.get("LD_PRELOAD", "")
    tuned = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
    tuned |= {"GLIBC_TUNABLES": t} if (t := os.environ.get("GLIBC_TUNABLES")) else {}
    name = preloaded or " ".join(platform.libc_ver()) or "the system's"
    return f"{name}, {tuned}" if tuned else f"{name}, defaults"
