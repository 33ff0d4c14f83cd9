"""The private noise source: it finds out where the noise belongs and who makes it there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipgrad.noise import checks
from clipgrad.noise.accelerator import AcceleratorNoise
from clipgrad.noise.cpu import CpuNoise
from clipgrad.noise.keys import Lineage, process
from clipgrad.noise.pieces import contiguous_targets, flat

# To make a tensor takes the host a microsecond; one more pass over so many values takes a large GPU as long. Smaller
# results are made by the division, all at once.
_LARGE = 2**18


class SystemNoise:
    """The private default: from a cipher, keyed by the operating system, never the same twice.

    Random bits are the keystream of a cipher, AES-128 in counter mode on the CPU and ChaCha20 (RFC
    8439) on a GPU with Triton, and a Box-Muller transform makes Gaussians of them. Who has seen any
    amount of noise and can tell it from fresh noise has broken the cipher. On other devices, and
    where the GPU's cipher is missing or does not compute what it should, noise is made on the CPU
    and copied over; the logger ``clipgrad`` says so once.

    The master key, 256 bits, comes from :mod:`secrets`. From it each call
    gets keys of its own (HKDF, RFC 5869), one a device, and no key meets a counter twice. Copies,
    unpickled objects, forked children and restored checkpoints make a new master key: noise used twice
    cancels in a difference. A checkpoint holds no key.

    Limits: noise is a rounded number, and the low bits of a sum tell of what was added (Mironov, "On
    Significance of the Least Significant Bits for Differential Privacy", 2012); no value exceeds 8.57
    sigma, 9.4 of float64 noise on a GPU (a Gaussian does with probability 1e-17); the time that it takes is not
    promised to be constant.

    Args:
        draws: Independent Gaussians of which each value is the sum, over ``sqrt(draws)``. With more
            than one, an adversary who searches for the bits behind an exact value has to search
            all of them at once (Holohan and Braghin, "Secure Random Sampling in Differential
            Privacy", 2021, section 4). Noise takes ``draws`` times as long.
        compile: Make float32 noise on the CPU by a loop in C, three times as fast. It is compiled at first use, in a
            third of a second, once a process, and compared with the uncompiled transform before it is used. If they
            differ, or there is no C compiler, noise is made uncompiled and the logger ``clipgrad`` says so once, as
            information.

    Raises:
        TypeError: If ``draws`` is not an integer, or ``compile`` not a truth value.
        ValueError: If ``draws`` is less than 1.

    Examples:
        >>> sums = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64)]
        >>> SystemNoise().add_gaussian_(sums, sigma=2.0)
        >>> SystemNoise(draws=4).add_gaussian_(sums, sigma=2.0)
    """

    def __init__(self, *, draws: int = 1, compile: bool = True) -> None:
        self._draws = checks.count("draws", draws)
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, got {compile!r}; True is the default.")
        self._compile = compile
        self._makers: _Makers | None = None

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        """Add fresh, independent ``N(0, sigma^2)``: see :meth:`NoiseSource.add_gaussian_`."""
        scale = checks.scale("sigma", sigma)
        if scale != 0.0:
            self._add(checks.targets(tensors, scale), scale)

    def _add(
        self,
        checked: list[Tensor],
        sigma: float,
        divisor: float = 1.0,
        *,
        elsewhere: bool = False,
    ) -> list[Tensor]:
        """Add and divide, in one pass where that is possible; for :func:`clipgrad.noise.mean.noised_mean` too."""
        makers = self._makers
        if makers is None or makers.process != process():  # a forked child has its parent's
            makers = self._makers = _Makers(self._draws, self._compile)
        return makers.add(checked, sigma, divisor, elsewhere)

    def state_dict(self) -> dict[str, Any]:
        """A marker only: with the key its reader could subtract the noise."""
        return {"kind": "SystemNoise", "format": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make a new master key: a checkpoint restored twice must not use the same noise twice.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If ``state`` is another noise source's.
        """
        checks.state(state, "SystemNoise")
        self._makers = None

    def __reduce__(self) -> tuple[Callable[[], SystemNoise], tuple[()]]:
        # For copy and pickle: a new source, never the same stream.
        return partial(SystemNoise, draws=self._draws, compile=self._compile), ()


class _Makers:
    """What makes noise in one process, from one master key. Thread-safe."""

    def __init__(self, draws: int, compiled: bool) -> None:
        self._lineage = Lineage()
        self._draws = draws
        self._lock = threading.Lock()
        self._cpu = CpuNoise(self._lineage, draws, compiled=compiled)
        self._accelerators: dict[torch.device, AcceleratorNoise] = {}
        self.process = self._lineage.process

    def add(
        self, tensors: list[Tensor], sigma: float, divisor: float, elsewhere: bool
    ) -> list[Tensor]:
        """``(tensors + N(0, sigma^2)) / divisor``: the tensors themselves, or others, which uses up the tensors."""
        with self._lock, torch.no_grad():
            results = list(tensors)
            for device, indices in _drawn_together(tensors):
                members = [tensors[index] for index in indices]
                found = self._add_to(device, members, sigma, divisor, elsewhere)
                for index, result in zip(indices, found, strict=True):
                    results[index] = result
            return results

    def _add_to(
        self,
        device: torch.device,
        tensors: list[Tensor],
        sigma: float,
        divisor: float,
        elsewhere: bool,
    ) -> list[Tensor]:
        targets, detours = contiguous_targets(tensors)
        if not detours and not elsewhere:
            self._add_on(device, targets, sigma, divisor)
            return tensors
        if not detours and device.type != "cpu" and _may_be_written_elsewhere(tensors):
            results = list(map(torch.empty_like, tensors))
            into, gaps = contiguous_targets(results)
            assert not gaps, "without gaps strides are kept"
            self._add_on(device, targets, sigma, divisor, into)
            return results
        self._add_on(device, targets, sigma)
        for tensor, detour in detours:
            tensor.add_(detour)
        if elsewhere:
            return list(torch._foreach_div(tensors, divisor))
        if divisor != 1.0:
            torch._foreach_div_(tensors, divisor)
        return tensors

    def _add_on(
        self,
        device: torch.device,
        targets: list[Tensor],
        sigma: float,
        divisor: float = 1.0,
        into: list[Tensor] | None = None,
    ) -> None:
        if device.type == "cpu":
            assert into is None, "the CPU's loop writes in place"
            self._cpu.add(flat(targets), sigma, divisor)
            return
        if device not in self._accelerators:
            self._accelerators[device] = AcceleratorNoise(
                device, self._lineage, self._cpu, self._draws
            )
        self._accelerators[device].add(targets, sigma, divisor, into)


def _may_be_written_elsewhere(tensors: list[Tensor]) -> bool:
    """Whether that is worth it, and memory holds the values themselves: a result has no bit for their sign."""
    large = sum(map(Tensor.numel, tensors)) > _LARGE * len(tensors)
    return large and not any(map(Tensor.is_neg, tensors))


def _drawn_together(tensors: list[Tensor]) -> list[tuple[torch.device, Sequence[int]]]:
    """Which of the tensors have the same device and the same dtype that their noise is drawn in."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    if len(kinds) == 1:
        return [(tensors[0].device, range(len(tensors)))]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, checks.DRAWN_IN[tensor.dtype]), []).append(index)
    return [(device, indices) for (device, _), indices in groups.items()]
