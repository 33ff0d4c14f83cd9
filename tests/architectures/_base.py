"""What an architecture is, the registry, and the small vocabulary the families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Batch = tuple[Any, ...]
MakeBatch = Callable[[int], Batch]
Make = TypeVar("Make", bound=Callable[[], nn.Module])


@dataclass(frozen=True)
class Architecture:
    """A named small model with its batch and loss: one difficulty that clipping has to survive."""

    name: str
    make: Callable[[], nn.Module]
    batch: MakeBatch
    loss: Callable[..., Tensor]
    trainable: Callable[[nn.Module], None] | None = None  # freezes what is not to be trained
    refused: str | None = None  # must be refused, with a message this pattern matches
    may_refuse: str | None = None  # exact, or refused with a message this pattern matches
    random: bool = False  # the forward draws random numbers: the loop is no oracle for it
    tolerance: float = 1e-9  # looser only where the model itself leaves float64
    why: str = ""

    def build(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> tuple[nn.Module, Batch]:
        """The model and a batch, equal on every call with the same arguments."""
        default = torch.get_default_dtype()
        # Made in its final dtype, not converted: conversion would detach views taken in __init__.
        torch.set_default_dtype(dtype)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = self.make().to(dtype)
                _move_off_initial_values(model)
                batch = self.batch(batch_size)
        finally:
            torch.set_default_dtype(default)
        if self.trainable is not None:
            self.trainable(model)
        return model.to(device), cast(batch, dtype, device)


def _move_off_initial_values(model: nn.Module) -> None:
    # Zeros and ones (biases, norm scales, LoRA's B) make wrong gradients vanish or coincide.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def cast(batch: Batch, dtype: torch.dtype, device: str | torch.device = "cpu") -> Batch:
    """The batch on `device`, its floating-point tensors in `dtype`."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

    moved: Batch = pytree.tree_map(move, batch)
    return moved


REGISTRY: dict[str, Architecture] = {}


def uneven(model: nn.Module, *inputs: Any) -> Tensor:
    """Mean square in which each output element has its own weight: no symmetry hides an error."""
    out = model(*inputs)
    out = out.reshape(out.shape[0], -1)
    weight = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype, device=out.device)
    return (weight * (out - 0.3).square()).mean()


def classify(model: nn.Module, *batch: Any) -> Tensor:
    """Cross entropy; the last entry of the batch holds the labels."""
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs), labels)


def classify_tokens(model: nn.Module, *batch: Any) -> Tensor:
    """Cross entropy over every position of (batch, time, classes)."""
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs).flatten(0, 1), labels.flatten())


def add(
    name: str,
    make: Callable[[], nn.Module],
    batch: MakeBatch,
    why: str,
    *,
    loss: Callable[..., Tensor] = uneven,
    **options: Any,
) -> None:
    """Register an architecture; a name may be taken once."""
    if name in REGISTRY:
        raise ValueError(f"architecture {name!r} exists already")
    REGISTRY[name] = Architecture(name, make, batch, loss, why=why, **options)


def architecture(name: str, batch: MakeBatch, **options: Any) -> Callable[[Make], Make]:
    """Register a module class that needs no arguments; its docstring says what it stresses."""

    def register(make: Make) -> Make:
        add(name, make, batch, make.__doc__ or "", **options)
        return make

    return register


def floats(*shape: int) -> MakeBatch:
    """One normal tensor of this shape per sample."""
    return lambda size: (torch.randn(size, *shape),)


def ids(vocabulary: int, *shape: int) -> MakeBatch:
    """One integer tensor of this shape per sample (a scalar label if no shape is given)."""
    return lambda size: (torch.randint(vocabulary, (size, *shape)),)


def padding(size: int) -> tuple[Tensor]:
    """True where a key is padding; the first two positions never are."""
    mask = torch.rand(size, 5) > 0.5
    mask[:, :2] = False
    return (mask,)


def several(*parts: MakeBatch) -> MakeBatch:
    """The batches of all parts, side by side as positional arguments."""
    return lambda size: tuple(entry for part in parts for entry in part(size))


def normal(*shape: int) -> nn.Parameter:
    """A parameter with small normal values."""
    return nn.Parameter(0.3 * torch.randn(shape))


def freeze(*prefixes: str) -> Callable[[nn.Module], None]:
    """A `trainable` that freezes every parameter whose name starts with one of the prefixes."""

    def apply(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes):
                parameter.requires_grad_(False)

    return apply
