"""Models, batches and losses of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.large_models import LORA_MODULES, gpt2, llama

BLOCKS = ("GPT2Block", "LlamaDecoderLayer")


class Setting(NamedTuple):
    """A model and a rank's batch.

    Attributes:
        make: Makes the model.
        rows: Of a rank's batch.
        length: Tokens of a row.
        is_replicated: Whether the whole model fits on each rank.
    """

    make: Callable[[], nn.Module]
    rows: int
    length: int
    is_replicated: bool = True


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank path of rank 16."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 16, bias=False)
        self.b = nn.Linear(16, base.out_features, bias=False)
        nn.init.normal_(self.b.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def llama_lora(*, tiny: bool = False, big: bool = False) -> nn.Module:
    """Return a frozen Llama with a trained low-rank path beside each attention projection."""
    model = llama(tiny=tiny, big=big).requires_grad_(False)
    for module in list(model.modules()):
        for name in LORA_MODULES:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, LowRank(getattr(module, name)))
    return model


SETTINGS = {
    "gpt2": Setting(gpt2, 16, 512),
    "gpt2-tiny": Setting(partial(gpt2, tiny=True), 4, 16),
    "llama-1b": Setting(llama, 4, 512),
    "llama-1b-tiny": Setting(partial(llama, tiny=True), 4, 16),
    "llama-lora": Setting(llama_lora, 8, 512),
    "llama-lora-tiny": Setting(partial(llama_lora, tiny=True), 4, 16),
    "llama-8b-lora": Setting(partial(llama_lora, big=True), 8, 512, is_replicated=False),
}


def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def in_half(device: torch.device) -> Callable[[nn.Module, Tensor], Tensor]:
    """The loss under autocast."""

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return loss_fn(model, ids)

    return loss


def built(setting: Setting, device: torch.device) -> nn.Module:
    """The model with the same weights on each rank."""
    torch.manual_seed(0)
    with device:
        return setting.make()


def batch(setting: Setting, model: nn.Module, device: torch.device) -> Tensor:
    """The rows of all ranks together, the same on each."""
    generator = torch.Generator().manual_seed(1)
    config: Any = model.config
    shape = (setting.rows * dist.get_world_size(), setting.length)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def own(rows: Tensor) -> Tensor:
    """The part of a rank."""
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def half_policy() -> MixedPrecisionPolicy:
    """Parameters are gathered in bfloat16, and gradients are reduced in float32."""
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model: nn.Module, *, half: bool, compiled: bool = False) -> None:
    """Call ``fully_shard`` on each block and on the model; ``compiled`` compiles each block, as users of FSDP2 do."""
    policy = half_policy() if half else MixedPrecisionPolicy()
    for module in list(model.modules()):
        if type(module).__name__ in BLOCKS:
            if compiled:
                module.compile()
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]
