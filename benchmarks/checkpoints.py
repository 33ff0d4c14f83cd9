"""Peak memory with and without activation checkpoints: ``python -m benchmarks.checkpoints [options]``.

Each row runs in a process of its own. On the CPU it is the peak of resident memory above what the process held before
the first step, on a GPU that of allocated memory.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("ordinary", "clipgrad")
MIB = 2**20


class Adapted(nn.Module):
    """A frozen layer with an adapter of rank 8."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        inputs, outputs = layer.weight.shape  # as transformers' Conv1D keeps them
        self.down = nn.Parameter(torch.randn(8, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, 8))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return self.layer(x) + added  # type: ignore[no-any-return]


def model_of(args: argparse.Namespace) -> nn.Module:
    """A small GPT-2, whole or frozen with adapters of LoRA."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=args.vocabulary, n_positions=args.length, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=args.dropout, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(config).to(args.device)
    if args.lora:
        model.requires_grad_(False)
        for block in model.transformer.h:
            for owner, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc")):  # fmt: skip
                setattr(owner, name, Adapted(getattr(owner, name)).to(args.device))
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # only reentrant checkpoints need it
    return model.train()  # type: ignore[no-any-return]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The usual loss of a language model."""
    found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return found


def step_of(args: argparse.Namespace, model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """One step, of gradients alone: an optimizer's state would be the same in each row."""
    if args.kind == "ordinary":
        loss = torch.compile(loss_of) if args.compile else loss_of

        def ordinary() -> None:
            loss(model, ids).backward()  # type: ignore[no-untyped-call]
            model.zero_grad()

        return ordinary
    import clipgrad

    performance = clipgrad.Performance(strategy=args.strategy)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = clipgrad.DPOptimizer(
        torch.optim.SGD(trained, lr=0.0),
        model,
        loss_of,
        max_grad_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=len(ids),
        microbatch_size=args.microbatch,
        compile=args.compile,
        performance=performance,
    )

    def private() -> None:
        optimizer.backward(ids)
        optimizer.zero_grad()

    return private


def peak(device: str) -> float:
    """Peak memory of this process since ``reset``, in MiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reset(device: str) -> float:
    """Start to measure; returns what is held now, in MiB."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def measure(args: argparse.Namespace) -> None:
    """Print one row."""
    warnings.simplefilter("ignore")
    model = model_of(args)
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length), device=args.device)
    step = step_of(args, model, ids)
    for _ in range(3 if args.compile else 1):
        step()  # a capture takes memory of its own
    held = reset(args.device)
    started = time.perf_counter()
    step()
    if args.device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    name = args.kind + (f", {args.strategy}" if args.kind == "clipgrad" else "")
    name += ", checkpoint" if args.checkpoint else ""
    print(f"| {name} | {peak(args.device) - held:.0f} | {seconds:.2f} |", flush=True)


def main() -> None:
    """Print the table, or one row of it with ``--kind``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"layers": 6, "width": 256, "heads": 4, "vocabulary": 1000, "length": 256, "batch": 8}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--strategy", default="auto", choices=("auto", "ghost", "kept"))  # fmt: skip
    for flag in ("checkpoint", "compile", "lora"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    if args.kind:
        measure(args)
        return
    print("| step | MiB | s |\n|---|---|---|", flush=True)
    for kind in KINDS:
        for checkpoint in ((), ("--checkpoint",)):
            command = [sys.executable, "-m", "benchmarks.checkpoints", *sys.argv[1:]]
            command += ["--kind", kind, *checkpoint]
            if subprocess.run(command, check=False).returncode:
                print(f"| {kind} {' '.join(checkpoint)} | failed | |", flush=True)


if __name__ == "__main__":
    main()
