"""What is fine-tuned in the benchmark: models of ``transformers`` with random weights, a batch, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import large_models

Batch = dict[str, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a classifier of images."""
    loss: Tensor = model(**batch).loss
    return loss


class Setting(NamedTuple):
    """A model, the batch, and the loss."""

    model: nn.Module
    batch: Batch
    loss: Callable[[nn.Module, Batch], Tensor] = loss_fn


def text(vocabulary: int, size: int, length: int, device: str, *, masked: bool = True) -> Batch:
    """Token ids with a padding mask; lengths lie evenly between half and all of ``length``."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (size, length), generator=generator)
    lengths = torch.linspace(length // 2, length, size).long() if masked else length
    mask = (torch.arange(length) < torch.as_tensor(lengths).reshape(-1, 1)).long().expand(size, -1)
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask.contiguous(), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def gpt2(device: str, *, tiny: bool = False, masked: bool = True) -> Setting:
    """GPT-2 small, all parameters trained, in float32."""
    model = large_models.gpt2(tiny=tiny).to(device)
    shape = (4, 16) if tiny else (16, 512)
    return Setting(model, text(model.config.vocab_size, *shape, device, masked=masked))


def llama_lora(device: str, *, tiny: bool = False) -> Setting:
    """Llama of one billion parameters in bfloat16 with LoRA adapters of rank 16 in float32."""
    import peft

    with torch.device(device):
        model = large_models.llama(tiny=tiny).to(torch.bfloat16)
    vocabulary = model.config.vocab_size
    modules = list(large_models.LORA_MODULES)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=modules)
    model = peft.get_peft_model(model, lora)
    shape = (4, 16) if tiny else (8, 512)
    return Setting(model, text(vocabulary, *shape, device))


def llama(device: str, *, tiny: bool = False) -> Setting:
    """Llama of one billion parameters, all of them trained, in float32."""
    with torch.device(device):
        model = large_models.llama(tiny=tiny)
    shape = (4, 16) if tiny else (4, 512)
    return Setting(model, text(model.config.vocab_size, *shape, device))


def vit(device: str, *, tiny: bool = False, masked: bool = True) -> Setting:
    """ViT-B/16 of 86 million parameters, all of them trained, in float32."""
    model = large_models.vit(tiny=tiny, masked=masked).to(device)
    generator = torch.Generator().manual_seed(0)
    size, side = (4, 32) if tiny else (64, 224)
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(10, (size,), generator=generator)
    batch = {"pixel_values": images.to(device), "labels": labels.to(device)}
    return Setting(model, batch, image_loss)


def in_bfloat16(setting: Setting) -> Setting:
    """The same setting under autocast."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(batch["labels"].device.type, torch.bfloat16):
            return setting.loss(model, batch)

    return setting._replace(loss=loss)


SETTINGS: dict[str, Callable[[str], Setting]] = {
    "gpt2": gpt2,
    "gpt2-unmasked": lambda device: gpt2(device, masked=False),
    "gpt2-bf16": lambda device: in_bfloat16(gpt2(device)),
    "gpt2-bf16-unmasked": lambda device: in_bfloat16(gpt2(device, masked=False)),
    "gpt2-bf16-tiny": lambda device: in_bfloat16(gpt2(device, tiny=True)),
    "gpt2-tiny": lambda device: gpt2(device, tiny=True),
    "llama-1b": llama,
    "llama-1b-bf16": lambda device: in_bfloat16(llama(device)),
    "llama-1b-bf16-tiny": lambda device: in_bfloat16(llama(device, tiny=True)),
    "llama-lora": llama_lora,
    "llama-lora-tiny": lambda device: llama_lora(device, tiny=True),
    "vit": vit,
    "vit-bf16": lambda device: in_bfloat16(vit(device)),
    "vit-bf16-unmasked": lambda device: in_bfloat16(vit(device, masked=False)),
    "vit-bf16-tiny": lambda device: in_bfloat16(vit(device, tiny=True)),
}
