"""What clipping costs on several processes, and whether they compute what one computes.

    torchrun --nproc-per-node=2 -m benchmarks.distributed gpt2 llama-lora             # two GPUs, NCCL
    torchrun --nproc-per-node=2 -m benchmarks.distributed gpt2-tiny llama-lora-tiny   # without GPUs: gloo, a try
    torchrun --nproc-per-node=2 -m benchmarks.distributed --backend gloo gpt2         # two processes on one GPU

The first rank prints one JSON object a line. ``sums`` compares the clipped sums of all ranks in float32 with those of
one process on the whole batch, relative to the largest element of each parameter. The other rows compare steps with
clipping and noise with ordinary steps of DDP and FSDP2. Models have random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import clipgrad
from benchmarks.large_models import LORA_MODULES, gpt2, llama

BLOCKS = ("GPT2Block", "LlamaDecoderLayer")
MULTIPLIER = 1.0


class Setting(NamedTuple):
    """A model and the size of a rank's batch."""

    make: Callable[[], nn.Module]
    rows: int
    length: int


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank path of rank 16."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(16, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, 16) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def llama_lora(*, tiny: bool = False) -> nn.Module:
    """Return a frozen Llama with a trained low-rank path beside each attention projection."""
    model = llama(tiny=tiny).requires_grad_(False)
    for module in list(model.modules()):
        for name in LORA_MODULES:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, LowRank(getattr(module, name)))
    return model


SETTINGS = {
    "gpt2": Setting(gpt2, 16, 512),
    "gpt2-tiny": Setting(lambda: gpt2(tiny=True), 4, 16),
    "llama-lora": Setting(llama_lora, 8, 512),
    "llama-lora-tiny": Setting(lambda: llama_lora(tiny=True), 4, 16),
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
    torch.manual_seed(0)
    with device:
        return setting.make()


def batch(setting: Setting, model: nn.Module, device: torch.device) -> Tensor:
    """The rows of all ranks together, the same on each."""
    generator = torch.Generator().manual_seed(1)
    rows = setting.rows * dist.get_world_size()
    shape = (rows, setting.length)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(device)  # type: ignore[union-attr]


def own(rows: Tensor) -> Tensor:
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def shard(model: nn.Module, *, half: bool) -> None:
    policy = MixedPrecisionPolicy()
    if half:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in list(model.modules()):
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def adamw(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")


def private(
    model: nn.Module,
    loss: Callable[..., Tensor],
    inner: torch.optim.Optimizer,
    size: int,
    **options: Any,
) -> clipgrad.DPOptimizer:
    given = {"noise_multiplier": MULTIPLIER, **options}
    return clipgrad.DPOptimizer(
        inner, model, loss, max_grad_norm=1.0, expected_batch_size=size, **given
    )


# ---------------------------------------------------------------------------------- sums


def sums(
    setting: Setting, device: torch.device, *, sharded: bool, alone: Any, left_out: int = 0
) -> dict[str, Tensor]:
    """Clipped sums in float32 without noise, of the whole batch: of all ranks, or of each alone in one pass."""
    model = built(setting, device)
    rows = batch(setting, model, device)
    mine = rows[left_out:] if alone is not None else own(rows)
    if sharded:
        shard(model, half=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    performance = clipgrad.Performance(process_group=alone)
    optimizer = private(
        model, loss_fn, torch.optim.SGD(trained, lr=0.0), 1, noise_multiplier=0.0, performance=performance,
        microbatch_size=max(1, setting.rows // 2) if alone is None else None,
    )  # fmt: skip
    optimizer.backward(mine)
    optimizer.step()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient: Any = parameter.grad
            whole = gradient.full_tensor() if sharded else gradient
            found[name] = whole.detach().cpu()
    return found


def compared(setting: Setting, device: torch.device) -> dict[str, Any]:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    torch.set_float32_matmul_precision("highest")
    expected = sums(setting, device, sharded=False, alone=groups[dist.get_rank()])
    largest = max(float(value.abs().max()) for value in expected.values())
    row: dict[str, Any] = {"parameters": len(expected), "largest element": largest}
    for kind in ("replicated", "fsdp2", "one row left out"):
        freed()
        planted = kind == "one row left out"  # the comparison has to see this
        found = sums(
            setting,
            device,
            sharded=kind == "fsdp2",
            alone=groups[dist.get_rank()] if planted else None,
            left_out=int(planted),
        )
        row[kind] = max(
            float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30))
            for name, value in expected.items()
        )
    return row


# ---------------------------------------------------------------------------------- speed


def ddp(setting: Setting, device: torch.device, *, compiled: bool) -> Callable[[], None]:
    model = built(setting, device)
    rows = own(batch(setting, model, device))
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    inner = adamw(model, device)
    loss = in_half(device)
    if compiled:
        loss = torch.compile(loss)

    def step() -> None:
        loss(wrapped, rows).backward()
        inner.step()
        inner.zero_grad()

    return step


def replicated(setting: Setting, device: torch.device, *, compiled: bool) -> Callable[[], None]:
    model = built(setting, device)
    rows = batch(setting, model, device)
    optimizer = private(
        model, in_half(device), adamw(model, device), len(rows), compile=compiled, microbatch_size=setting.rows
    )  # fmt: skip
    return private_step(optimizer, own(rows))


def fsdp2(setting: Setting, device: torch.device) -> Callable[[], None]:
    model = built(setting, device)
    rows = own(batch(setting, model, device))
    shard(model, half=True)
    inner = adamw(model, device)

    def step() -> None:
        loss_fn(model, rows).backward()
        inner.step()
        inner.zero_grad()

    return step


def sharded(setting: Setting, device: torch.device) -> Callable[[], None]:
    model = built(setting, device)
    rows = batch(setting, model, device)
    shard(model, half=True)
    optimizer = private(
        model, loss_fn, adamw(model, device), len(rows), microbatch_size=setting.rows
    )
    return private_step(optimizer, own(rows))


def private_step(optimizer: clipgrad.DPOptimizer, rows: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.backward(rows)
        optimizer.step()
        optimizer.zero_grad()

    return step


def freed() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def waited(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(
    make: Callable[[], Callable[[], None]], setting: Setting, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Median time, tokens a second of all ranks, and the largest peak of a rank's memory."""
    freed()
    started = time.perf_counter()
    step = make()
    for _ in range(8):
        step()
    waited(device)
    warm = time.perf_counter() - started
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        dist.barrier()
        waited(device)
        start = time.perf_counter()
        step()
        waited(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    worst = torch.tensor(
        [statistics.median(times), float(peak)], device=device, dtype=torch.float32
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    seconds, memory = worst.tolist()
    tokens = setting.rows * setting.length * dist.get_world_size()
    return {
        "ms": round(1e3 * seconds, 2),
        "tokens/s": round(tokens / seconds),
        "GiB a rank": round(memory / 2**30, 2),
        "warm-up s": round(warm, 1),
    }


def makers(
    setting: Setting, device: torch.device, compiled: bool
) -> Iterator[tuple[str, Callable[[], Callable[[], None]]]]:
    yield "DDP", lambda: ddp(setting, device, compiled=False)
    yield "replicated, clipped", lambda: replicated(setting, device, compiled=False)
    yield "FSDP2", lambda: fsdp2(setting, device)
    yield "FSDP2, clipped", lambda: sharded(setting, device)
    if compiled:
        yield "DDP, compiled", lambda: ddp(setting, device, compiled=True)
        yield "replicated, clipped, compiled", lambda: replicated(setting, device, compiled=True)


# ---------------------------------------------------------------------------------- the run


def told(row: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)


def attempt(kind: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
    """Print a row, or the error in its place; the other rows still come."""
    try:
        found = work()
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    told({**kind, **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", choices=("sums", "speed"))
    parser.add_argument(
        "--backend", choices=("nccl", "gloo"), help="gloo lets several processes share a GPU"
    )
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = args.backend or ("nccl" if cuda else "gloo")
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    for name in args.settings:
        setting = SETTINGS[name]
        head = {"setting": name, "ranks": dist.get_world_size(), "torch": torch.__version__}
        if args.only != "speed":
            attempt({**head, "kind": "sums"}, lambda setting=setting: compared(setting, device))
        torch.set_float32_matmul_precision("high")
        if args.only != "sums":
            for kind, make in makers(setting, device, not args.no_compile):
                attempt(
                    {**head, "kind": kind},
                    lambda make=make, setting=setting: measured(make, setting, device, args.rounds),
                )
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
