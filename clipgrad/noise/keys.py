"""Where every key comes from: one secret of the operating system's, and no key handed out twice."""

from __future__ import annotations

import itertools
import os
import secrets
import threading

import torch
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_MASTER_BYTES = 32
_forks = itertools.count(1)
_generation = 0


def _forked() -> None:
    global _generation
    _generation = next(_forks)


if hasattr(os, "register_at_fork"):  # a pid can come back: a grandchild may have its ancestor's
    os.register_at_fork(after_in_child=_forked)


def process() -> tuple[int, int]:
    """Differs between a process and its forked children, for a fork copies keys and counters."""
    return os.getpid(), _generation


def new_master() -> bytes:
    """A fresh secret of 256 bits."""
    return secrets.token_bytes(_MASTER_BYTES)


class Lineage:
    """A master key, born in this process, and the keys derived from it. Thread-safe.

    It is never copied, pickled or saved: whoever would need it makes a new one. So no two processes
    (ranks, data loader workers) and no two copies of a noise source share a master key.
    """

    def __init__(self) -> None:
        self.process = process()
        self._master = new_master()
        self._handed_out = 0
        self._lock = threading.Lock()

    def key(self, device: torch.device, size: int) -> bytes:
        """A key of ``size`` bytes that nobody has had, for one stream: one call's, on one device.

        HKDF-Expand with SHA-256 (RFC 5869, section 2.3); the master key is uniform, so that the
        extraction step may be left out (section 3.3). The running number alone makes each ``info``
        differ from all others, the device says whose key it is.
        """
        with self._lock:
            number = self._handed_out
            self._handed_out += 1
        info = _info(number, str(device))
        return HKDFExpand(SHA256(), size, info).derive(self._master)


def _info(number: int, device: str) -> bytes:
    """Fields of fixed width first, the one of free length last: no two inputs give the same."""
    return b"clipgrad.noise/1" + number.to_bytes(8, "big") + device.encode()
