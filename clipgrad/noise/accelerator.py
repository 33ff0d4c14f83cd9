"""Noise for an accelerator is made there by a verified cipher, or else on the CPU and copied."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipgrad.kernels.launcher import passes
from clipgrad.noise import checks
from clipgrad.noise.block import Block
from clipgrad.noise.cpu import CpuNoise
from clipgrad.noise.keys import KeyDeriver
from clipgrad.noise.pieces import flat, pieces

if TYPE_CHECKING:
    # Triton is optional.
    from clipgrad.kernels.chacha_launch import TritonChaCha
    from clipgrad.kernels.correlated_launch import TritonRows

_ROWS_OF_A_BLOCK = {torch.float32: 16, torch.float64: 8}  # values of one block of the cipher
_KEY_BYTES = 32  # ChaCha20 has no other key size
_COPIED_AT_A_TIME = 2**22  # 16 MB of float32, on the CPU and on the device
_log = logging.getLogger("clipgrad")
_warned_devices: set[str] = set()
_warning_lock = threading.Lock()


class AcceleratorNoise:
    """Add noise to tensors on one device, not the CPU. Only one call may run at a time.

    Each value is the scaled sum of ``draws`` Gaussians. ``cpu`` makes them if the device has no verified cipher.
    """

    def __init__(
        self, device: torch.device, key_deriver: KeyDeriver, cpu: CpuNoise, draws: int
    ) -> None:
        self._device, self._key_deriver, self._cpu, self._draws = device, key_deriver, cpu, draws
        self._cipher = verified_cipher(device)
        self._rows: dict[object, TritonRows | None] = {}

    def add(
        self,
        tensors: list[Tensor],
        sigma: float,
        divisor: float = 1.0,
        into: list[Tensor] | None = None,
    ) -> None:
        """Add noise to contiguous tensors whose noise has one dtype, and divide the sums by ``divisor``.

        The results go to ``into``, tensors of the same shapes, or stay in place; ``tensors`` may change anyway.
        """
        into = tensors if into is None else into
        if self._cipher is None:
            self._add_copied(flat(tensors), sigma)
            if divisor != 1.0:
                torch._foreach_div_(tensors, divisor)
            if into is not tensors:
                torch._foreach_copy_(into, tensors)
            return
        limit = self._cipher.limit(self._draws)
        for piece, results in zip(pieces(tensors, limit), pieces(into, limit), strict=True):
            key = self._key_deriver.key(self._device, _KEY_BYTES)
            self._cipher.add_gaussian_(piece, sigma, self._draws, key, divisor, results)

    def rows_ahead(self, tail: Sequence[float], like: Tensor) -> int:
        """Return how many rows of correlated noise to make at once.

        It is a power of two and about half the number of past rows. So a value that is made takes about two reads of
        past rows, which are hidden behind the cipher's work. More rows at once would only take more memory. Without a
        kernel each past row is read for each new row, so rows ahead would gain nothing.
        """
        half = max(1, (len(tail) + 1) // 2)
        ahead = min(_ROWS_OF_A_BLOCK[like.dtype], 1 << half.bit_length() - 1)
        return ahead if self._rows_kernel(tail, ahead, like) is not None else 1

    def rows(self, block: Block, sigma: float) -> bool:
        """Make new rows of correlated noise; return False, and change nothing, if the device has no kernel for it."""
        kernel = self._rows_kernel(block.tail, block.ahead, block.ring)
        if kernel is None:
            return False
        size, limit = block.ring.shape[1], kernel.limit()
        for start in range(0, size, limit):
            key = self._key_deriver.key(self._device, _KEY_BYTES)
            kernel.make(block, (start, min(start + limit, size)), sigma, key)
        return True

    def _rows_kernel(self, tail: Sequence[float], ahead: int, like: Tensor) -> TritonRows | None:
        which = (tuple(tail), ahead, like.dtype)
        if which not in self._rows:
            self._rows[which] = None if self._cipher is None else self._verified(tail, ahead, like)
        return self._rows[which]

    def _verified(self, tail: Sequence[float], ahead: int, like: Tensor) -> TritonRows | None:
        if _ROWS_OF_A_BLOCK[like.dtype] % ahead:
            return None
        from clipgrad.kernels.correlated_launch import TritonRows  # Triton is optional

        kernel = TritonRows(tail, ahead, like, self._draws)

        def agrees() -> bool:
            with torch.inference_mode(False):
                kernel.self_test()
            return True

        return kernel if passes(agrees, "makes correlated noise") else None

    def _add_copied(self, flats: list[Tensor], sigma: float) -> None:
        for piece in pieces(flats, _COPIED_AT_A_TIME):
            sizes = [part.numel() for part in piece]
            noise = torch.zeros(sum(sizes), dtype=checks.NOISE_DTYPE[piece[0].dtype], device="cpu")
            self._cpu.add([noise], sigma)
            torch._foreach_add_(piece, noise.to(self._device).split(sizes))


def verified_cipher(device: torch.device) -> TritonChaCha | None:
    """Return the device's cipher if it passes its self-test; else warn and return None.

    None means that the CPU's cipher makes the noise. A statistical generator of the device must never replace it.
    """
    try:
        if device.type != "cuda":
            raise NotImplementedError(f"there is no cipher for {device.type}")
        from clipgrad.kernels.chacha_launch import TritonChaCha  # Triton is optional

        cipher = TritonChaCha(device)
        cipher.self_test()
    except Exception as error:  # a compiler can raise any exception; the CPU's noise is as private
        _warn_once(device, error)
        return None
    return cipher


def _warn_once(device: torch.device, error: Exception) -> None:
    with _warning_lock:
        if str(device) in _warned_devices:
            return
        _warned_devices.add(str(device))
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    _log.warning(
        "Noise for %s is made on the CPU and copied there, which is as private and slower: %s (%s). "
        "On CUDA, install the Triton that belongs to this PyTorch.",
        device,
        reason,
        type(error).__name__,
    )
