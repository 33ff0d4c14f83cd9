"""This module takes repeatable noise from a ``torch.Generator``, for experiments. It is not private."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipgrad.noise import checks


class SeededNoise:
    """This class takes repeatable noise from your generator. INSECURE, NOT PRIVATE: use it for experiments only.

    An adversary who knows the seed can subtract the noise, and one who sees enough noise can find the seed: PyTorch's
    generators (Mersenne Twister, Philox) are statistical, not cryptographic.

    Values are sampled tensor by tensor in one thread on the generator's device, so the result depends on the
    generator's state and the tensors only. A forked child repeats its parent's stream.

    Args:
        generator: The generator, whose state advances. Noise for a tensor on another device is copied there.

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
        """Add the next ``N(0, sigma^2)``; see :meth:`NoiseSource.add_gaussian_`."""
        scale = checks.scale("sigma", sigma)
        if scale == 0.0:
            return
        device = self._generator.device
        with torch.no_grad():
            for tensor in checks.targets(tensors, scale):
                noise = torch.empty(
                    tensor.shape, dtype=checks.NOISE_DTYPE[tensor.dtype], device=device
                )
                noise.normal_(0.0, scale, generator=self._generator)
                tensor.add_(noise.to(tensor.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's exact state: a restored run continues as if it had never been interrupted."""
        device, state = self._generator.device.type, self._generator.get_state()
        return {"kind": "SeededNoise", "format": 1, "device": device, "generator": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state`` was saved, with a generator on the same type of device.

        Raises:
            ValueError: If ``state`` comes from another noise source or another type of device.
        """
        checks.require_state(state, "SeededNoise")
        device = self._generator.device.type
        if state["device"] != device:
            raise ValueError(
                f"state['device'] is {state['device']!r}, but the generator is on {device!r} and samples "
                f"other values; build SeededNoise with torch.Generator({state['device']!r})."
            )
        self._generator.set_state(state["generator"].cpu())
