"""Noise on an accelerator: by a cipher that runs there and proved it, else made on the CPU and copied."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import torch
from torch import Tensor

from clipgrad.kernels.chacha_proof import AddsGaussians
from clipgrad.noise import checks
from clipgrad.noise.cpu import CpuNoise
from clipgrad.noise.keys import Lineage
from clipgrad.noise.pieces import flat, pieces

_KEY_BYTES = 32  # ChaCha20 knows no other size
_COPIED_AT_A_TIME = 2**22  # 16 MB of float32 on either side
_log = logging.getLogger("clipgrad")
_told: set[str] = set()
_telling = threading.Lock()


class DeviceCipher(AddsGaussians, Protocol):
    """What draws on the device itself."""

    def limit(self, draws: int) -> int:
        """The most values that one key is good for."""
        ...


class AcceleratorNoise:
    """Adds noise to tensors on one device. For one call at a time.

    Args:
        device: Not the CPU.
        lineage: Hands out the keys.
        cpu: Makes the noise if the device cannot.
        draws: Independent values of which each value of the noise is the scaled sum.
    """

    def __init__(self, device: torch.device, lineage: Lineage, cpu: CpuNoise, draws: int) -> None:
        self._device, self._lineage, self._cpu, self._draws = device, lineage, cpu, draws
        self._cipher = proved_cipher(device)

    def add(
        self,
        tensors: list[Tensor],
        sigma: float,
        divisor: float = 1.0,
        into: list[Tensor] | None = None,
    ) -> None:
        """Add to tensors of the device, all drawn in one dtype and each contiguous, and divide the sums.

        Args:
            tensors: Used up, or left as they are.
            sigma: Standard deviation, positive.
            divisor: A public constant.
            into: Tensors alike that get the results; in place if None.
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
            key = self._lineage.key(self._device, _KEY_BYTES)
            self._cipher.add_gaussian_(piece, sigma, self._draws, key, divisor, results)

    def _add_copied(self, flats: list[Tensor], sigma: float) -> None:
        for piece in pieces(flats, _COPIED_AT_A_TIME):
            sizes = [part.numel() for part in piece]
            noise = torch.zeros(sum(sizes), dtype=checks.DRAWN_IN[piece[0].dtype], device="cpu")
            self._cpu.add([noise], sigma)
            torch._foreach_add_(piece, noise.to(self._device).split(sizes))


def proved_cipher(device: torch.device) -> DeviceCipher | None:
    """The device's cipher, if it computes there what it must; None, and a warning, if not.

    Nothing but a cipher may take its place: the answer None means the CPU's, never a statistical
    generator of the device.
    """
    try:
        if device.type != "cuda":
            raise NotImplementedError(f"there is no cipher for {device.type}")
        from clipgrad.kernels.chacha_launch import TritonChaCha  # Triton is optional

        cipher = TritonChaCha(device)
        cipher.prove()
    except Exception as error:  # a compiler may fail in any way; the CPU's noise is as private
        _tell(device, error)
        return None
    return cipher


def _tell(device: torch.device, error: Exception) -> None:
    with _telling:
        if str(device) in _told:
            return
        _told.add(str(device))
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    _log.warning(
        "Noise for %s is made on the CPU and copied there, which is as private and slower: %s (%s). "
        "On CUDA, install the Triton that belongs to this PyTorch.",
        device,
        reason,
        type(error).__name__,
    )
