"""Derive all keys from one secret of the operating system, and never return a key twice."""

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


if hasattr(os, "register_at_fork"):  # pids are reused: a grandchild may have the pid of an ancestor
    os.register_at_fork(after_in_child=_forked)


def process() -> tuple[int, int]:
    """Return an identifier that differs between a process and its forked children: a fork copies keys and counters."""
    return os.getpid(), _generation


def new_master() -> bytes:
    """Return a fresh secret of 256 bits."""
    return secrets.token_bytes(_MASTER_BYTES)


class KeyDeriver:
    """This class holds a master key, made in this process, and derives keys from it. It is thread-safe.

    The master key is never copied, pickled or saved: a copy of a noise source makes a new master key. So no two
    processes (ranks, data loader workers) and no two noise sources share one.
    """

    def __init__(self) -> None:
        self.process = process()
        self._master = new_master()
        self._handed_out = 0
        self._lock = threading.Lock()

    def key(self, device: torch.device, size: int) -> bytes:
        """Return a new key of ``size`` bytes for one stream, that is for one call on one device.

        HKDF-Expand with SHA-256 (RFC 5869, section 2.3) derives it. The master key is uniform, so that the extraction
        step may be omitted (section 3.3). The running number alone makes every ``info`` unique; the device states what
        the key is for.
        """
        with self._lock:
            number = self._handed_out
            self._handed_out += 1
        info = _info(number, str(device))
        return HKDFExpand(SHA256(), size, info).derive(self._master)


def _info(number: int, device: str) -> bytes:
    """Encode number and device without collisions: fields of fixed width come first, the field of free length last."""
    return b"clipgrad.noise/1" + number.to_bytes(8, "big") + device.encode()
