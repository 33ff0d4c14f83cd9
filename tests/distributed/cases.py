"""Define small trainings that run on one process and on several with the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import DPOptimizer

STEPS = 20
_SIZES = (5, 3, 0, 7, 1, 4)  # of the logical batches, over and over
# Which part of a batch's rows goes to the first rank: everything, nothing, and unequal parts.
_FIRST = (0.4, 1.0, 0.0, 0.7, 0.5)


class Tied(nn.Module):
    """This model's head is the transpose of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).tanh())


class LowRank(nn.Module):
    """This layer adds a trained low-rank product to a frozen layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, inputs) / 2)
        self.b = nn.Parameter(torch.randn(outputs, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def _frozen() -> nn.Module:
    model = mlp()
    model[2].requires_grad_(False)
    return model


def _lora() -> nn.Module:
    return nn.Sequential(LowRank(4, 6), nn.Tanh(), LowRank(6, 3))


def _convolution() -> nn.Module:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.GroupNorm(1, 3), nn.Flatten()
    )
    return model.to(memory_format=torch.channels_last)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def language(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


@dataclass(frozen=True)
class Case:
    """This class holds a model, its loss and its data."""

    make: Callable[[], nn.Module]
    loss: Callable[..., Tensor] = squares
    vocabulary: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.make().double()

    def batches(self, steps: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        found = []
        for step in range(steps):
            size = _SIZES[step % len(_SIZES)]
            if self.vocabulary is not None:
                found.append(torch.randint(self.vocabulary, (size, 6), generator=generator))
            else:
                rows = torch.randn(size, 4, generator=generator, dtype=torch.float64)
                found.append(rows * torch.arange(1, size + 1)[:, None])
        return found


CASES = {
    "mlp": Case(mlp),
    "microbatches": Case(mlp, options={"microbatch_size": 2}),
    "groups": Case(mlp, options={"max_grad_norm": {"0": 0.5, "": 1.0}}),
    "tied": Case(Tied, tokens, 11),
    "frozen": Case(_frozen),
    "lora": Case(_lora),
    "channels last": Case(_convolution),
    "gpt2": Case(_gpt2, language, 17),
    "llama": Case(llama, language, 17),
}


def own_rows(batch: Tensor, step: int, rank: int, size: int) -> Tensor:
    """Return the rows of one rank; every row belongs to exactly one rank."""
    if size == 1:
        return batch
    first = round(len(batch) * _FIRST[step % len(_FIRST)])
    cuts = [0, *(first + (len(batch) - first) * k // (size - 1) for k in range(size))]
    return batch[cuts[rank] : cuts[rank + 1]]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.5, momentum=0.9)


def zero(model: nn.Module) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    trained = [p for p in model.parameters() if p.requires_grad]
    return ZeroRedundancyOptimizer(trained, optimizer_class=torch.optim.AdamW, lr=0.05)


def private(
    model: nn.Module, case: Case, inner: torch.optim.Optimizer, **options: Any
) -> DPOptimizer:
    given = {
        "max_grad_norm": 1.0,
        "noise_multiplier": 0.0,
        "expected_batch_size": 4.0,
        **case.options,
        **options,
    }
    return DPOptimizer(inner, model, case.loss, **given)


def take(optimizer: DPOptimizer, batches: list[Tensor], *, calls_differ: bool = True) -> None:
    """Take a step on each batch, in two halves; replicated ranks may call backward a different number of times."""
    for own in batches:
        optimizer.backward(own[: len(own) // 2])
        if len(own) or not calls_differ:
            optimizer.backward(own[len(own) // 2 :])
        optimizer.step()
        optimizer.zero_grad()


def train(
    rank: int,
    size: int,
    name: str,
    inner: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    steps: int = STEPS,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Return the parameters after some steps."""
    case = CASES[name]
    model = case.model()
    optimizer = private(model, case, inner(model), **(options or {}))
    take(optimizer, [own_rows(b, step, rank, size) for step, b in enumerate(case.batches(steps))])
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def shard_root(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def shard_layers(model: nn.Module, **options: Any) -> None:
    """Shard each direct child with parameters and each block of a language model as a module of its own.

    Args:
        model: The model.
        **options: Of ``fully_shard``.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = [m for m in model.modules() if type(m).__name__ in ("GPT2Block", "LlamaDecoderLayer")]
    tied = isinstance(model, Tied)
    layers = blocks or [m for m in model.children() if any(True for _ in m.parameters())]
    for layer in [model.body] if tied else layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def train_sharded(
    rank: int,
    size: int,
    name: str,
    shard: Callable[[nn.Module], None] = shard_root,
    inner: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    steps: int = STEPS,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Return the whole parameters of a model of FSDP2 after some steps."""
    case = CASES[name]
    model = case.model()
    if shard is shard_replicas and rank >= size // 2:  # replicas start from the first one's shard
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    shard(model)
    optimizer = private(model, case, inner(model), **(options or {}))
    batches = [own_rows(b, step, rank, size) for step, b in enumerate(case.batches(steps))]
    take(optimizer, batches, calls_differ=False)
    return {key: value.full_tensor().detach() for key, value in model.named_parameters()}  # type: ignore[operator]


def shard_replicas(model: nn.Module) -> None:
    """Shard over half of the ranks; the other half holds replicas of the shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
