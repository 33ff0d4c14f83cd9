"""What clipping costs where people fine-tune: text with padding masks, LoRA, half precision, images, one GPU.

    python -m benchmarks.finetuning gpt2 llama-lora              # on a GPU, a few minutes each
    python -m benchmarks.finetuning gpt2-bf16 --profile gpt2.txt # and where the device's time goes
    python -m benchmarks.finetuning vit-bf16 --precision medium  # one bfloat16 term of a scaled factor
    python -m benchmarks.finetuning gpt2-tiny --device cpu       # a try of the script itself

Models come from ``transformers`` configurations with random weights. The private step has forward and backward pass,
clipping, noise and AdamW. The ordinary one has the same without clipping and noise. ``torch.compile`` compiles it, with
CUDA graphs ("recorded") and without; percentages are of the faster of both. Kinds of steps take turns in one process.
In a turn, steps follow each other as in training, and the host waits for the device at the end. Rows hold medians, and
means for batches as Poisson sampling draws them.
Memory is what PyTorch takes from the device, as ``nvidia-smi`` shows it, for model, optimizer and batch of one kind.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import nn
from torch.profiler import ProfilerActivity, profile

import clipgrad
from benchmarks.device import fits, most_taken, taken, wait
from benchmarks.finetuned import SETTINGS, Batch, Setting

WARM = 16
TURN = 5  # steps
POISSON = 60  # batches of changing size; as many steps are 12 rounds
ALLOWED = 1.3  # times the memory of the ordinary step
# A compiled step is compared with the eager one in steps 1, 2, 4, 8, 16. Recordings are made in the first ones.
MEASURED = {1: "the first", 12: "a usual", 16: "a compared"}
USUAL = f"GiB in {MEASURED[12]} step"


def adamw(model: nn.Module, device: str) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=device != "cpu")


def ordinary(setting: Setting, device: str, mode: str) -> Callable[[], None]:
    model, batch = copy.deepcopy(setting.model), setting.batch
    optimizer, compiled = adamw(model, device), torch.compile(setting.loss, mode=mode)

    def step() -> None:
        compiled(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def private(
    setting: Setting, device: str, compile: bool | str, *, poisson: bool = False
) -> Callable[[], None]:
    """A step on batches of one size, or of the sizes that Poisson batches have."""
    model, batch = copy.deepcopy(setting.model), setting.batch
    size = len(batch["labels"])
    batches = itertools.cycle(poisson_batches(batch) if poisson else [batch])
    optimizer = clipgrad.DPOptimizer(
        adamw(model, device), model, setting.loss, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=size,
        microbatch_size=None if poisson else size, compile=compile,
    )  # fmt: skip

    def step() -> None:
        optimizer.backward(next(batches))
        optimizer.step()
        optimizer.zero_grad()

    return step


def poisson_batches(batch: Batch) -> list[Batch]:
    """Batches whose sizes are quantiles of a Poisson distribution, evenly spaced and in random order.

    Their mean size is that of the batch, whose rows they repeat.
    """
    mean = len(batch["labels"])
    places = (torch.arange(POISSON) + 0.5) / POISSON
    sizes = stats.poisson.ppf(places.numpy(), mean).astype(int)
    order = torch.randperm(POISSON, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(max(sizes), device=batch["labels"].device) % mean
    largest = {name: leaf[rows] for name, leaf in batch.items()}
    return [{name: leaf[: sizes[i]] for name, leaf in largest.items()} for i in order]


def milliseconds(step: Callable[[], None], device: str) -> float:
    """Run a turn, and return the milliseconds of one of its steps."""
    wait(device)
    start = time.perf_counter()
    for _ in range(TURN):
        step()
    wait(device)
    return 1e3 * (time.perf_counter() - start) / TURN


def kernels(step: Callable[[], None], device: str) -> str:
    """A table of what three steps run on the device, with the longest first."""
    where = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[where], acc_events=True) as profiler:
        for _ in range(3):
            step()
        wait(device)
    order = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    averages = profiler.key_averages()
    table: str = averages.table(sort_by=order, row_limit=60, max_name_column_width=100)
    return table


# Private steps come first, since the next kind may use memory that they leave free.
KINDS: dict[str, Callable[[Setting, str, str], Callable[[], None]]] = {
    "private, compiled": private,
    "private, Poisson": lambda setting, device, mode: private(setting, device, mode, poisson=True),
    "private, eager": lambda setting, device, mode: private(setting, device, False),
    "ordinary, recorded": lambda setting, device, mode: ordinary(
        setting, device, "reduce-overhead"
    ),
    "ordinary": lambda setting, device, mode: ordinary(setting, device, "default"),
}


def warmed(step: Callable[[], None], device: str, before: int, started: float) -> dict[str, float]:
    """Run steps until all has been compiled, and return the memory that they took and seconds until the tenth."""
    row: dict[str, float] = {}
    for number in range(1, WARM + 1):
        if number in MEASURED:
            peak = most_taken(step, device) - before
            row[f"GiB in {MEASURED[number]} step"] = round(peak / 2**30, 2)
        else:
            step()
        if number == 10:
            wait(device)
            row["tenth step after s"] = round(time.perf_counter() - started, 1)
    return row


def left_until_quiet(ran: int, rounds: int) -> int:
    """How many steps to run before those that are measured, so that none of these is compared with the eager step.

    A step is compared if its number is a power of two. One comparison would change the mean of all steps.
    """
    return int(2 ** math.ceil(math.log2(max(4 * WARM, rounds * TURN)))) - ran


def measured(
    name: str, device: str, rounds: int, mode: str, profile_to: Path | None, kinds: Sequence[str]
) -> dict[str, Any]:
    """Milliseconds of each kind of step, seconds until its tenth was done, and the most memory that it took alone."""
    setting = SETTINGS[name](device)
    steps: dict[str, Callable[[], None]] = {}
    row: dict[str, Any] = {"setting": name}
    at_rest: dict[str, int] = {}
    for kind, make in KINDS.items():
        if kind in kinds:
            before, started = taken(device), time.perf_counter()
            steps[kind] = make(setting, device, mode)
            found = warmed(steps[kind], device, before, started)
            row |= {f"{kind}: {what}": value for what, value in found.items()}
            at_rest[kind] = taken(device) - before
    of_private = [kind for kind in steps if "private" in kind]
    of_ordinary = [kind for kind in steps if "ordinary" in kind]
    allowed = ALLOWED * 2**30 * min(row[f"{kind}: {USUAL}"] for kind in of_ordinary)
    for kind in of_private:
        ran = WARM
        # Poisson batches may be larger than the ordinary ones, and take more memory.
        if "Poisson" not in kind:
            limit = taken(device) - at_rest[kind] + allowed
            # The last of these steps is compared with the eager one.
            row[f"{kind}: fits in {ALLOWED} x ordinary"] = fits(steps[kind], WARM, device, limit)
            ran += WARM
        for _ in range(left_until_quiet(ran, rounds)):
            steps[kind]()
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        for kind, step in steps.items():
            times[kind].append(milliseconds(step, device))
    for kind, found in times.items():
        # Batches of changing size have no typical one.
        average = statistics.mean if "Poisson" in kind else statistics.median
        row[f"{kind}: ms"] = round(average(found), 2)
    fastest = min(row[f"{kind}: ms"] for kind in of_ordinary)
    for kind in of_private:
        row[f"{kind}: % of ordinary"] = round(100 * fastest / row[f"{kind}: ms"], 1)
    if profile_to is not None:
        with profile_to.open("a") as file:
            for kind, step in steps.items():
                print(f"{name}, {kind}, three steps\n{kernels(step, device)}", file=file)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--mode", default="reduce-overhead", help="compile= of the private step")
    parser.add_argument(
        "--precision",
        default="high",
        choices=("highest", "high", "medium"),
        help="of float32 products, for both steps",
    )
    parser.add_argument("--kinds", nargs="+", default=tuple(KINDS), choices=KINDS)
    parser.add_argument(
        "--profile", type=Path, help="append tables of the device's kernels to this file"
    )
    args = parser.parse_args()
    if not any("ordinary" in kind for kind in args.kinds):
        parser.error("--kinds needs an ordinary step, with which the others are compared")
    # By default TF32, as in ordinary training on such a GPU.
    torch.set_float32_matmul_precision(args.precision)
    for name in args.settings:
        print(
            json.dumps(
                measured(name, args.device, args.rounds, args.mode, args.profile, args.kinds)
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
