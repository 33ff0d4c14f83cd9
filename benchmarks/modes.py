"""The modes of a row: the ordinary step, the ordinary step that accumulates gradients, clipgrad's, the peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS
from benchmarks.step import LEARNING_RATE, NOISE_MULTIPLIER, Make, Setting, Step
from clipgrad import DPOptimizer


class Kind(Enum):
    """Who computes the gradient."""

    STANDARD = "standard"
    CLIPGRAD = "clipgrad"
    PEER = "peer"


class Microbatch(Enum):
    """Samples per forward pass, as a share of the batch."""

    BATCH = "batch"
    QUARTER = "batch/4"
    ONE = "1"

    def of(self, batch_size: int) -> int:
        if self is Microbatch.BATCH:
            return batch_size
        return 1 if self is Microbatch.ONE else max(1, batch_size // 4)


@dataclass(frozen=True)
class Mode:
    """One line of a table.

    Attributes:
        key: As in test names and files of results.
        label: As in the tables.
        kind: Ordinary, clipgrad's or a peer's.
        microbatch: Samples per forward pass.
        compiled: Whether ``torch.compile`` (or a jit of the peer's own) makes the step.
        make: Makes the step.
        graphs: Whether it replays CUDA graphs.
    """

    key: str
    label: str
    kind: Kind
    microbatch: Microbatch
    compiled: bool
    make: Make
    graphs: bool = False

    @property
    def private(self) -> bool:
        return self.kind is not Kind.STANDARD


@dataclass(frozen=True)
class Variant:
    """How the ordinary step runs.

    Attributes:
        compiled: Through ``torch.compile``.
        fused: AdamW as one kernel, or as it comes.
        graphs: CUDA graphs, which ``torch.compile`` calls "reduce-overhead".
    """

    compiled: bool
    fused: bool
    graphs: bool = False

    @property
    def label(self) -> str:
        how = "CUDA graphs" if self.graphs else "compiled" if self.compiled else "eager"
        return f"{how}, {'fused ' if self.fused else ''}AdamW"

    @property
    def key(self) -> str:
        how = "graphs" if self.graphs else "compiled" if self.compiled else "eager"
        return f"{how}-{'fused' if self.fused else 'plain'}"


def adamw(model: nn.Module, *, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=fused or None)


def standard(setting: Setting, variant: Variant, microbatch: Microbatch, backend: str) -> Step:
    """The step of somebody who has no private data; in several forward passes if memory is short."""
    model, batch = setting.model_and_batch()
    optimizer = adamw(model, fused=variant.fused)
    loss_fn = setting.workload.loss
    size = microbatch.of(setting.batch_size)
    pieces = list(zip(*(leaf.split(size) for leaf in batch), strict=True))

    def loss_of(*piece: Tensor) -> Tensor:
        return loss_fn(model, *piece)

    if variant.compiled:
        mode = "reduce-overhead" if variant.graphs else None
        loss_of = torch.compile(loss_of, backend=backend, mode=mode, fullgraph=True, dynamic=False)
    scale = size / setting.batch_size

    def step() -> None:
        optimizer.zero_grad()
        for piece in pieces:
            loss = loss_of(*piece)
            (loss if scale == 1.0 else loss * scale).backward()
        optimizer.step()

    return step


class ClippedStep:
    """clipgrad's step: a PrivateStep."""

    def __init__(self, setting: Setting, microbatch: Microbatch, compile: bool | str) -> None:
        self._model, self._batch = setting.model_and_batch()
        self._optimizer = DPOptimizer(
            adamw(self._model, fused=True),
            self._model,
            setting.workload.loss,
            max_grad_norm=setting.max_grad_norm,
            noise_multiplier=NOISE_MULTIPLIER,
            expected_batch_size=setting.batch_size,
            microbatch_size=microbatch.of(setting.batch_size),
            compile=compile,
        )

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        self._optimizer.backward(*self._batch)
        self._optimizer.step()

    def clipped_gradient(self) -> Mapping[str, Tensor]:
        self._optimizer.zero_grad()
        self._optimizer.backward(*self._batch)
        return self._optimizer.clipped_sums


def _standard_modes(device: str, backend: str) -> list[Mode]:
    variants = [Variant(compiled, fused) for compiled in (False, True) for fused in (False, True)]
    if device == "cuda":
        variants.append(Variant(compiled=True, fused=True, graphs=True))
    modes = []
    for microbatch in Microbatch:
        for variant in variants:
            if microbatch is not Microbatch.BATCH and (variant.graphs or not variant.fused):
                continue  # accumulating: the faster AdamW; a graph's gradients live until its next replay only
            modes.append(
                Mode(
                    key=f"standard-{variant.key}-{_slug(microbatch)}",
                    label=f"standard ({variant.label})",
                    kind=Kind.STANDARD,
                    microbatch=microbatch,
                    compiled=variant.compiled,
                    make=_bind(standard, variant, microbatch, backend),
                    graphs=variant.graphs,
                )
            )
    return modes


def _clipgrad_modes(device: str, quick: bool) -> list[Mode]:
    how: list[tuple[str, bool | str]] = [("eager", False)]
    if not quick:  # tests/compiled checks what clipgrad compiles
        how.append(("compiled", True))
        if device == "cuda":
            how.append(("graphs", "reduce-overhead"))
    return [
        Mode(
            key=f"clipgrad-{name}-{_slug(microbatch)}",
            label=f"clipgrad ({'CUDA graphs' if name == 'graphs' else name})",
            kind=Kind.CLIPGRAD,
            microbatch=microbatch,
            compiled=name != "eager",
            make=_bind(ClippedStep, microbatch, value),
            graphs=name == "graphs",
        )
        for microbatch in Microbatch
        for name, value in how
    ]


def _peer_modes() -> list[Mode]:
    return [
        Mode(
            key=_slug(peer.name),
            label=peer.name,
            kind=Kind.PEER,
            microbatch=Microbatch.BATCH,
            compiled=peer.compiled,
            make=peer.make,
        )
        for peer in PEERS.values()
    ]


def modes(device: str, *, quick: bool = False) -> dict[str, Mode]:
    """All modes of a device type, in the order of the tables.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        quick: Compile as little as still runs the code: for a check of correctness, not for times.
    """
    backend = "eager" if quick else "inductor"  # "eager": Dynamo alone
    found = [*_standard_modes(device, backend), *_clipgrad_modes(device, quick), *_peer_modes()]
    if quick:  # a backend other than Inductor knows no CUDA graphs
        found = [mode for mode in found if not mode.graphs]
    return {mode.key: mode for mode in found}


def _slug(value: Microbatch | str) -> str:
    if isinstance(value, Microbatch):
        return {"batch": "mb-all", "batch/4": "mb-quarter", "1": "mb-one"}[value.value]
    return value.lower().replace("(", "-").replace(")", "").replace(" ", "-").replace("_", "-")


def _bind(make: Callable[..., Step], *arguments: Any) -> Make:
    return lambda setting: make(setting, *arguments)


__all__ = ["Kind", "Microbatch", "Mode", "modes"]
