"""This module defines a family: a small model, a batch and a loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 10
Batch = dict[str, Tensor]
FAMILIES: dict[str, Family] = {}


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a Hugging Face model computes itself."""
    loss: Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class Family:
    """This class describes one family.

    Attributes:
        make: Builds the model; it may skip the test if a package is missing.
        batch: From a number of samples to the batch, samples first.
        loss: Of a model and a batch.
        dtype: In which it is compared with a loop.
        tolerance: Largest relative error of a norm or a clipped sum.
        training: Whether the model is in training mode; random parts are switched off.
        note: What a reader should know of the configuration.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor] = field(default=own_loss)
    dtype: torch.dtype | None = torch.float64
    tolerance: float = 1e-9
    training: bool = True
    note: str = ""

    def build(self, size: int) -> tuple[nn.Module, Batch]:
        """Return model and batch, made with fixed seeds, without random layers in the model."""
        torch.manual_seed(0)
        model = self.make().train(self.training)
        if self.dtype is not None:
            model = model.to(self.dtype)
        without_randomness(model)
        torch.manual_seed(1)
        batch = self.batch(size)
        for name, value in batch.items():
            if self.dtype is not None and value.is_floating_point():
                batch[name] = value.to(self.dtype)
        return model, batch


def without_randomness(model: nn.Module) -> None:
    """Switch off dropout and similar layers, whose random numbers differ in each run."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if ("drop" in name or name == "p") and isinstance(value, float):
                setattr(module, name, 0.0)
        if hasattr(module, "config"):
            for name, value in list(vars(module.config).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(module.config, name, 0.0)


def add(
    name: str, make: Callable[[], nn.Module], batch: Callable[[int], Batch], **other: Any
) -> None:
    """Register a family under a name."""
    FAMILIES[name] = Family(make, batch, **other)


def hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a function that makes a Hugging Face model with random weights."""

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return built

    return make


def masked(size: int) -> Batch:
    """Return token ids and an attention mask with unequal lengths."""
    ids = torch.randint(3, VOCABULARY, (size, LENGTH))
    lengths = torch.tensor([LENGTH, LENGTH - 4, LENGTH - 1, 5])[torch.arange(size) % 4]
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": ids.where(mask == 1, 1), "attention_mask": mask}


def language(size: int) -> Batch:
    """Return a batch for a language model, whose labels are the tokens without padding."""
    batch = masked(size)
    return {**batch, "labels": batch["input_ids"].where(batch["attention_mask"] == 1, -100)}


def labelled(size: int) -> Batch:
    """Return a batch for a text classifier."""
    return {**masked(size), "labels": torch.randint(3, (size,))}


def images(pixels: int) -> Callable[[int], Batch]:
    """Return a batch for an image classifier."""
    return lambda size: {
        "pixel_values": torch.randn(size, 3, pixels, pixels),
        "labels": torch.randint(3, (size,)),
    }
