"""Gaussian noise. Apart from :mod:`clipgrad.sampling`, the only place where randomness enters.

A :class:`NoiseSource` is the seam: the optimizer holds one and calls nothing else.
:class:`SystemNoise` is the private default, :class:`SeededNoise` is repeatable and not private.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from clipgrad import _noise_checks as checks
from clipgrad._noise_pieces import flat_targets, pieces, share_out

# Tensor.add_ on more values than this starts an OpenMP team in each thread that calls it. The
# scratch is 128 kB and stays in a core's own cache.
_CPU_PIECE = 2**15
_PIECES_PER_WORKER = 4  # 0.3 ms of drawing: no thread is worth waking for less
_MOST_WORKERS = 4  # on 16 cores eight took longer: they wait for the interpreter's lock
# On an accelerator one draw serves many tensors: two launches, not two per tensor. 64 MB at most.
_ACCELERATOR_PIECE = 2**24
_PID_AT_IMPORT = os.getpid()


class NoiseSource(Protocol):
    """What draws the noise: anything with these three methods."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        """Add fresh, independent ``N(0, sigma^2)`` in place to every value of every tensor.

        Args:
            tensors: Dense floating-point tensors of any shape, stride and device, each once.
            sigma: Standard deviation in the tensors' own unit; 0 adds and draws nothing.

        Raises:
            ValueError: If ``sigma`` is negative, infinite or NaN, or vanishes in a tensor's dtype;
                if a tensor is there twice.
            TypeError: If a tensor is not dense or not float64, float32, float16 or bfloat16.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: strings, integers and tensors only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that :meth:`state_dict` of the same class returned."""
        ...


def gaussian_sigma(*, noise_multiplier: float, sensitivity: float) -> float:
    """The standard deviation of the noise: ``noise_multiplier * sensitivity``, checked.

    This is the Gaussian mechanism: Dwork and Roth, "The Algorithmic Foundations of Differential
    Privacy" (2014), appendix A.

    Args:
        noise_multiplier: Noise per unit of sensitivity, finite and at least 0.
        sensitivity: The most by which one sample changes the sum (L2), in the sum's own unit.

    Returns:
        Positive and finite; 0.0 if ``noise_multiplier`` is 0, whatever the sensitivity.

    Raises:
        ValueError: If no finite, positive noise of that size exists.

    Examples:
        >>> gaussian_sigma(noise_multiplier=1.5, sensitivity=2.0)
        3.0
        >>> gaussian_sigma(noise_multiplier=0.0, sensitivity=float("inf"))
        0.0
    """
    multiplier = checks.scale("noise_multiplier", noise_multiplier)
    if multiplier == 0.0:
        return 0.0
    bound = checks.real("sensitivity", sensitivity)
    sigma = multiplier * bound
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(
            f"sensitivity must be positive and finite when noise_multiplier is {multiplier}, got "
            f"{bound}, so that sigma = {sigma}: "
            + (
                "there is nothing to hide. "
                if bound == 0
                else "no noise hides an unbounded change. "
            )
            + "Give a positive, finite max_grad_norm, or noise_multiplier=0 to train without privacy."
        )
    return sigma


class SystemNoise:
    """The private default: seeded by the operating system, never the same twice.

    Each device, and on the CPU each worker thread, has a generator of its own. On the CPU its whole
    state comes from :mod:`secrets`, for ``torch.Generator.manual_seed`` keeps 32 bits of a seed
    there, few enough to try them all; elsewhere the seed has 63. Copies, unpickled objects, forked
    children and restored checkpoints are seeded anew: noise used twice cancels in a difference.

    Limits: Mersenne Twister and Philox are statistical generators, not cryptographic ones, and the
    noise is a rounded number (Mironov, "On Significance of the Least Significant Bits for
    Differential Privacy", 2012); in float32 on the CPU PyTorch draws nothing beyond
    ``sqrt(-2 ln 2^-24) = 5.77`` sigma. Against an adversary who reads every bit of every update,
    pass a :class:`NoiseSource` made for it.

    Examples:
        >>> sums = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64)]
        >>> SystemNoise().add_gaussian_(sums, sigma=2.0)
    """

    def __init__(self) -> None:
        self._streams: _Streams | None = None

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        """Add fresh, independent ``N(0, sigma^2)``: see :meth:`NoiseSource.add_gaussian_`."""
        scale = checks.scale("sigma", sigma)
        if scale == 0.0:
            return
        checked = checks.targets(tensors, scale)
        streams = self._streams
        if streams is None or streams.pid != os.getpid():  # a forked child has its parent's
            streams = self._streams = _Streams()
        streams.add(checked, scale)

    def state_dict(self) -> dict[str, Any]:
        """A marker only: with a generator's state its reader could subtract the noise."""
        return {"kind": "SystemNoise", "format": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Seed anew: a checkpoint restored twice must not use the same noise twice.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If ``state`` is another noise source's.
        """
        checks.state(state, "SystemNoise")
        self._streams = None

    def __reduce__(self) -> tuple[type[SystemNoise], tuple[()]]:
        return SystemNoise, ()  # for copy and pickle: a new source, never the same stream


class SeededNoise:
    """Repeatable noise from your generator. NOT PRIVATE: who knows the seed can subtract it.

    Values are drawn tensor by tensor by one thread on the generator's device, so that the result
    depends on nothing else. A forked child repeats its parent's stream.

    Args:
        generator: Draws and advances; a tensor on another device gets its noise copied there.

    Raises:
        TypeError: If ``generator`` is not a ``torch.Generator``.

    Examples:
        >>> source, total = SeededNoise(torch.Generator().manual_seed(0)), torch.zeros(2)
        >>> saved = source.state_dict()
        >>> source.add_gaussian_([total], sigma=1.0)
        >>> source.load_state_dict(saved)
        >>> source.add_gaussian_([total], sigma=1.0)  # the same values again
        >>> torch.equal(total, 2 * torch.randn(2, generator=torch.Generator().manual_seed(0)))
        True
    """

    def __init__(self, generator: torch.Generator) -> None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {generator!r}; pass "
                "torch.Generator().manual_seed(seed), or use SystemNoise() for privacy."
            )
        self._generator = generator

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        """Add the next ``N(0, sigma^2)``: see :meth:`NoiseSource.add_gaussian_`."""
        scale = checks.scale("sigma", sigma)
        if scale == 0.0:
            return
        device = self._generator.device
        with torch.no_grad():
            for tensor in checks.targets(tensors, scale):
                noise = torch.empty(
                    tensor.shape, dtype=checks.DRAWN_IN[tensor.dtype], device=device
                )
                noise.normal_(0.0, scale, generator=self._generator)
                tensor.add_(noise.to(tensor.device))

    def state_dict(self) -> dict[str, Any]:
        """The generator's exact state: a restored run continues as if never interrupted."""
        device, state = self._generator.device.type, self._generator.get_state()
        return {"kind": "SeededNoise", "format": 1, "device": device, "generator": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state`` was saved.

        Args:
            state: What :meth:`state_dict` returned, with a generator on the same type of device.

        Raises:
            ValueError: If ``state`` is another noise source's or another device type's.
        """
        checks.state(state, "SeededNoise")
        device = self._generator.device.type
        if state["device"] != device:
            raise ValueError(
                f"state['device'] is {state['device']!r}, but the generator is on {device!r} and "
                f"draws otherwise; build SeededNoise with torch.Generator({state['device']!r})."
            )
        self._generator.set_state(state["generator"].cpu())


def os_seeded_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator, its state random: 19937 bits of it on the CPU, 63 elsewhere.

    Raises:
        RuntimeError: If this PyTorch lays out the CPU generator's state in an unknown way.
    """
    generator = torch.Generator(device)
    seed = secrets.randbits(63)
    generator.manual_seed(seed)
    if generator.device.type != "cpu":
        return generator
    # In 64-bit words: seed, flags, next, the 624 words of the Mersenne Twister, spare normals.
    # manual_seed made the 624 from the low 32 bits of the seed, so the first two are known.
    state = generator.get_state()
    first = seed & 0xFFFFFFFF
    second = (1812433253 * (first ^ (first >> 30)) + 1) & 0xFFFFFFFF
    if state.numel() != 5056 or state.view(torch.int64)[3:5].tolist() != [first, second]:
        raise RuntimeError(
            f"torch {torch.__version__} keeps a CPU generator's state in an unknown layout, and "
            "its own seeds have 32 bits. Use an older torch, or pass a NoiseSource of your own."
        )
    words = torch.frombuffer(bytearray(secrets.token_bytes(4 * 624)), dtype=torch.int32)
    state.view(torch.int64)[3 : 3 + 624] = words.to(torch.int64).bitwise_and(0xFFFFFFFF)
    generator.set_state(state)
    return generator


class _Streams:
    """The generators of one process and the threads that draw from them. Thread-safe."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._by_device: dict[torch.device, list[_Stream]] = {}
        self._threads = ThreadPoolExecutor(_MOST_WORKERS)

    def add(self, tensors: list[Tensor], sigma: float) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.device, checks.DRAWN_IN[tensor.dtype]), []).append(tensor)
        with self._lock, torch.no_grad():
            for (device, _), members in groups.items():
                self._add_on(device, members, sigma)

    def _add_on(self, device: torch.device, tensors: list[Tensor], sigma: float) -> None:
        flats, detours = flat_targets(tensors)
        if device.type == "cpu":
            parts = list(pieces(flats, _CPU_PIECE))
            # PyTorch's threading does not survive a fork: "Invalid thread pool!", now and then.
            threads = torch.get_num_threads() if self.pid == _PID_AT_IMPORT else 1
            workers = max(1, min(threads, _MOST_WORKERS, len(parts) // _PIECES_PER_WORKER))
        else:
            parts, workers = list(pieces(flats, _ACCELERATOR_PIECE)), 1
        streams = self._by_device.setdefault(device, [])
        while len(streams) < workers:
            streams.append(_Stream(device))
        workers_add = [partial(stream.add, sigma=sigma) for stream in streams[:workers]]
        share_out(parts, workers_add, self._threads)
        for tensor, detour in detours:
            tensor.add_(detour)


class _Stream:
    """One generator and its scratch memory, used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._generator = os_seeded_generator(device)
        self._scratch: dict[torch.dtype, Tensor] = {}

    def add(self, piece: list[Tensor], sigma: float) -> None:
        sizes = [part.numel() for part in piece]
        noise = self._buffer(sum(sizes), piece[0]).normal_(0.0, sigma, generator=self._generator)
        torch._foreach_add_(piece, noise.split(sizes))

    def _buffer(self, size: int, like: Tensor) -> Tensor:
        dtype = checks.DRAWN_IN[like.dtype]
        if like.device.type != "cpu":  # there the allocator keeps memory at hand
            return torch.empty(size, dtype=dtype, device=like.device)
        if dtype not in self._scratch:
            with torch.inference_mode(False):  # else unusable outside of that mode
                self._scratch[dtype] = torch.empty(_CPU_PIECE, dtype=dtype)
        return self._scratch[dtype][:size]
