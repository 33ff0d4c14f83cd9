"""What batches of changing lengths cost: 50 batches of 20 lengths, from the first compilation to the last step.

    OMP_NUM_THREADS=1 python -m benchmarks.lengths ordinary private     # a small GPT-2 with padding masks, CPU

Each kind runs in this process, one after the other, with an empty cache of compiled code (``TORCHINDUCTOR_CACHE_DIR``),
unless ``--warm`` keeps the one that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import clipgrad
from benchmarks.finetuned import Batch, loss_fn, text
from benchmarks.finetuning import adamw

SIZE, VOCABULARY = 8, 512


def model_of(layers: int, width: int) -> nn.Module:
    """A small GPT-2 without dropout, float32."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def batches(count: int, lengths: int) -> list[Batch]:
    """Batches of lengths from 24 to 64, in a random order."""
    different = torch.linspace(24, 64, lengths).long()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.cat(
        [different, different[torch.randint(lengths, (count,), generator=generator)]]
    )[:count]
    order = torch.randperm(count, generator=generator)
    return [text(VOCABULARY, SIZE, int(length), "cpu") for length in chosen[order]]


def ordinary(model: nn.Module) -> Callable[[Batch], None]:
    optimizer, compiled = adamw(model, "cpu"), torch.compile(loss_fn)

    def step(batch: Batch) -> None:
        compiled(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def private(model: nn.Module, *, compile: bool = True) -> Callable[[Batch], None]:
    optimizer = clipgrad.DPOptimizer(
        adamw(model, "cpu"), model, loss_fn, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=SIZE,
        microbatch_size=SIZE, compile=compile,
    )  # fmt: skip

    def step(batch: Batch) -> None:
        optimizer.backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


KINDS: dict[str, Callable[[nn.Module], Callable[[Batch], None]]] = {
    "ordinary": ordinary,
    "private": private,
    "private-eager": lambda model: private(model, compile=False),
}


def processor_seconds() -> float:
    """Of this process and of the compilers that it has started."""
    of = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(who)[:2]) for who in of)


def measured(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    step, given = (
        KINDS[kind](model_of(args.layers, args.width)),
        batches(args.batches, args.lengths),
    )
    started, processor, each = time.perf_counter(), processor_seconds(), []
    for batch in given:
        before = time.perf_counter()
        step(batch)
        each.append(time.perf_counter() - before)
    return {
        "kind": kind,
        "seconds": round(time.perf_counter() - started, 1),
        "processor seconds": round(processor_seconds() - processor, 1),
        "steps over a second": [(i, round(s, 1)) for i, s in enumerate(each) if s > 1],
        "median ms": round(1e3 * statistics.median(each), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--lengths", type=int, default=20)
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as empty:
            if not args.warm:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            print(json.dumps(measured(kind, args)), flush=True)


if __name__ == "__main__":
    main()
