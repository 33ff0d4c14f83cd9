"""This module is the private noise source. It determines on which device noise is needed and what makes it there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from clipgrad.noise import checks
from clipgrad.noise.accelerator import AcceleratorNoise
from clipgrad.noise.block import Block
from clipgrad.noise.cpu import CpuNoise
from clipgrad.noise.keys import KeyDeriver, process
from clipgrad.noise.pieces import contiguous_targets, flat
from clipgrad.noise.source import NoiseSource

# A new tensor costs the host a microsecond, as long as a large GPU takes for one more pass over this many values.
# Smaller results are allocated by the division, all at once.
_LARGE = 2**18
# On a CPU this many rows of correlated noise are made at once, but no more than the past rows that are kept.
_MOST_AHEAD = 16


class SystemNoise:
    """The private default takes noise from a cipher keyed by the operating system. It never repeats noise.

    Random bits are the keystream of a cipher: AES-128 in counter mode on the CPU, ChaCha20 (RFC 8439) on a GPU with
    Triton. A Box-Muller transform turns them into Gaussians. An adversary who has seen any amount of noise and can tell
    it from fresh noise has broken the cipher. On other devices, and where the GPU's cipher is missing or fails its
    self-test, noise is made on the CPU and copied; the logger ``clipgrad`` reports that once.

    The master key, 256 bits, comes from :mod:`secrets`. Each call derives new keys from it (HKDF, RFC 5869), one per
    device, and no key uses a counter twice. Copies, unpickled objects, forked children and restored checkpoints make a
    new master key, since noise used twice cancels in a difference. A checkpoint holds no key.

    Limits: noise is a rounded number, and the low bits of a sum reveal something about its terms (Mironov, "On
    Significance of the Least Significant Bits for Differential Privacy", 2012). No value exceeds 8.57 sigma, or 9.4
    sigma for float64 noise on a GPU (a Gaussian exceeds 8.57 sigma with probability 1e-17). Noise does not take
    constant time.

    Args:
        draws: Number of independent Gaussians whose sum, divided by ``sqrt(draws)``, is one value. With more than one,
            an adversary who searches for the bits behind an exact value must search all of them at once (Holohan and
            Braghin, "Secure Random Sampling in Differential Privacy", 2021, section 4). Noise takes ``draws`` times as
            long.
        compile: Make float32 noise on the CPU by a loop in C, three times as fast. The loop is compiled once per
            process, at first use, in a third of a second, and compared with the uncompiled transform before it is used.
            If they differ, or there is no C compiler, noise is made uncompiled, and the logger ``clipgrad`` reports
            that once at level INFO.

    Raises:
        TypeError: If ``draws`` is not an integer, or ``compile`` not a bool.
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
        self._process_noise: _ProcessNoise | None = None

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        """Add fresh, independent ``N(0, sigma^2)``; see :meth:`NoiseSource.add_gaussian_`."""
        scale = checks.scale("sigma", sigma)
        if scale != 0.0:
            self._add(checks.targets(tensors, scale), scale)

    def _add(
        self,
        checked: list[Tensor],
        sigma: float,
        divisor: float = 1.0,
        *,
        out_of_place: bool = False,
    ) -> list[Tensor]:
        """Add and divide, in one pass where possible; ``step_noise.noised_mean`` calls this method too."""
        return self._of_this_process().add(checked, sigma, divisor, out_of_place)

    def _in_turns(
        self, counts: Sequence[int], sigma: float, use: Callable[[int, Tensor], None]
    ) -> None:
        """Make float32 noise on the CPU and hand it over piece by piece; see ``CpuNoise.in_turns``."""
        self._of_this_process().in_turns(counts, checks.scale("sigma", sigma), use)

    def _rows(self, block: Block, sigma: float) -> bool:
        """Make new rows of correlated noise on an accelerator; return False if it has no kernel that does it."""
        return self._of_this_process().rows(block, checks.scale("sigma", sigma))

    def _rows_ahead(self, tail: Sequence[float], like: Tensor) -> int:
        """Return how many rows of correlated noise to make at once, for the device and dtype of ``like``."""
        return self._of_this_process().rows_ahead(tail, like)

    def _of_this_process(self) -> _ProcessNoise:
        found = self._process_noise
        # A forked child has a copy of its parent's object.
        if found is None or found.process != process():
            found = self._process_noise = _ProcessNoise(self._draws, self._compile)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return a marker without the key: with the key a reader of the checkpoint could subtract the noise."""
        return {"kind": "SystemNoise", "format": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make a new master key: a checkpoint restored twice must not use the same noise twice.

        Raises:
            ValueError: If ``state`` comes from another noise source.
        """
        checks.require_state(state, "SystemNoise")
        self._process_noise = None

    def __reduce__(self) -> tuple[Callable[[], SystemNoise], tuple[()]]:
        # A copied or unpickled object is a new source with another stream.
        return partial(SystemNoise, draws=self._draws, compile=self._compile), ()


class _ProcessNoise:
    """This class makes the noise of one process from one master key. It is thread-safe."""

    def __init__(self, draws: int, compiled: bool) -> None:
        self._key_deriver = KeyDeriver()
        self._draws = draws
        self._lock = threading.Lock()
        self._cpu = CpuNoise(self._key_deriver, draws, compiled=compiled)
        self._accelerators: dict[torch.device, AcceleratorNoise] = {}
        self.process = self._key_deriver.process

    def add(
        self, tensors: list[Tensor], sigma: float, divisor: float, out_of_place: bool
    ) -> list[Tensor]:
        """Return ``(tensors + N(0, sigma^2)) / divisor``, in place or in new tensors; ``tensors`` may change anyway."""
        with self._lock, torch.no_grad():
            results = list(tensors)
            for (device, _), indices in by_device_and_noise_dtype(tensors).items():
                members = [tensors[index] for index in indices]
                found = self._add_to(device, members, sigma, divisor, out_of_place)
                for index, result in zip(indices, found, strict=True):
                    results[index] = result
            return results

    def in_turns(
        self, counts: Sequence[int], sigma: float, use: Callable[[int, Tensor], None]
    ) -> None:
        """Hand over noise piece by piece."""
        with self._lock, torch.no_grad():
            self._cpu.in_turns(counts, sigma, use)

    def rows(self, block: Block, sigma: float) -> bool:
        """Make new rows of correlated noise, if an accelerator has a kernel for it."""
        if block.ring.device.type == "cpu":
            return False
        with self._lock, torch.no_grad():
            return self._accelerator(block.ring.device).rows(block, sigma)

    def rows_ahead(self, tail: Sequence[float], like: Tensor) -> int:
        """Return how many rows of correlated noise to make at once."""
        if like.device.type == "cpu":
            return max(1, min(len(tail), _MOST_AHEAD))
        with self._lock, torch.no_grad():
            return self._accelerator(like.device).rows_ahead(tail, like)

    def _add_to(
        self,
        device: torch.device,
        tensors: list[Tensor],
        sigma: float,
        divisor: float,
        out_of_place: bool,
    ) -> list[Tensor]:
        targets, additions = contiguous_targets(tensors)
        if not additions and not out_of_place:
            self._add_on(device, targets, sigma, divisor)
            return tensors
        if not additions and device.type != "cpu" and _out_of_place_pays(tensors):
            results = list(map(torch.empty_like, tensors))
            into, gaps = contiguous_targets(results)
            assert not gaps, "without gaps strides are kept"
            self._add_on(device, targets, sigma, divisor, into)
            return results
        self._add_on(device, targets, sigma)
        for tensor, addition in additions:
            tensor.add_(addition)
        if out_of_place:
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
        self._accelerator(device).add(targets, sigma, divisor, into)

    def _accelerator(self, device: torch.device) -> AcceleratorNoise:
        if device not in self._accelerators:
            self._accelerators[device] = AcceleratorNoise(
                device, self._key_deriver, self._cpu, self._draws
            )
        return self._accelerators[device]


def _out_of_place_pays(tensors: list[Tensor]) -> bool:
    """Return whether new results are worth it and possible: they cannot represent a lazily negated tensor."""
    large = sum(map(Tensor.numel, tensors)) > _LARGE * len(tensors)
    return large and not any(map(Tensor.is_neg, tensors))


def by_device_and_noise_dtype(
    tensors: Sequence[Tensor],
) -> dict[tuple[torch.device, torch.dtype], Sequence[int]]:
    """Return the positions of the tensors on each device whose noise has the same dtype."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    if len(kinds) == 1:
        device, dtype = kinds.pop()
        return {(device, checks.NOISE_DTYPE[dtype]): range(len(tensors))}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, checks.NOISE_DTYPE[tensor.dtype]), []).append(index)
    return dict(groups)


# It is read once, on import: a later replacement in the class itself must be called, not passed over.
_OWN_METHOD = SystemNoise.add_gaussian_


def is_plain_system_noise(source: NoiseSource) -> TypeGuard[SystemNoise]:
    """Return whether the source is a ``SystemNoise`` whose ``add_gaussian_`` nobody has replaced."""
    method = getattr(source.add_gaussian_, "__func__", None)
    return isinstance(source, SystemNoise) and method is _OWN_METHOD
