"""Every other library that a user would pick instead, set up as its own documentation says.

This file must not import torch: the JAX worker lies in this package, and its environment has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.step import PrivateStep, Setting


@dataclass(frozen=True)
class Peer:
    """A library in one of its modes.

    Attributes:
        name: As in the tables.
        package: The distribution that has to be installed; None if PyTorch is enough.
        make: Makes the private step. Raises ``Unavailable`` where the library is missing or cannot express the
            workload; what the library itself raises comes out of here or of the first step.
        remark: How it was set up, for a footnote.
        compiled: Whether the library compiles the step.
    """

    name: str
    package: str | None
    make: Callable[[Setting], PrivateStep]
    remark: str
    compiled: bool = False


def _later(module: str, **arguments: Any) -> Callable[[Setting], PrivateStep]:
    """``benchmarks.peers.<module>.make``, imported when it is called."""

    def make(setting: Setting) -> PrivateStep:
        step: PrivateStep = import_module(f"benchmarks.peers.{module}").make(setting, **arguments)
        return step

    return make


_OPACUS = "PrivacyEngine.make_private, poisson_sampling=False, fused AdamW"
_POSITIONS = "the transformers' position embedding moved into a module of its own"

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "vmap(grad)",
            None,
            _later("vmap_grad"),
            "torch.func.vmap(grad), then clip, sum and noise by hand; fused AdamW",
        ),
        Peer(
            "Opacus hooks",
            "opacus",
            _later("opacus", mode="hooks"),
            f'{_OPACUS}, grad_sample_mode="hooks"; {_POSITIONS}',
        ),
        Peer(
            "Opacus ghost",
            "opacus",
            _later("opacus", mode="ghost"),
            f'{_OPACUS}, grad_sample_mode="ghost", so two backward passes; {_POSITIONS}',
        ),
        Peer(
            "Opacus functorch",
            "opacus",
            _later("opacus", mode="functorch"),
            f'{_OPACUS}, grad_sample_mode="functorch"; {_POSITIONS}',
        ),
        Peer(
            "opake",
            "opake",
            _later("opake"),
            "clipped_grad and gaussian_noise, no microbatches; its own adamw",
        ),
        Peer(
            "BackPACK",
            "backpack-for-pytorch",
            _later("backpack"),
            "BatchGrad, then clip, sum and noise by hand; fused AdamW",
        ),
        Peer(
            "jax_privacy",
            "jax-privacy",
            _later("jax_privacy"),
            "clipped_grad, gaussian_privatizer and optax.adamw in one jitted step, timed in a process of its own; "
            "the same model written in JAX, microbatches of 1 on a CPU, where they are fastest",
            compiled=True,
        ),
    )
}

__all__ = ["PEERS", "Peer"]
