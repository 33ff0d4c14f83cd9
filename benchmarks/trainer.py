"""What ``DPTrainer`` costs beside a bare loop: the same model, plan, batches and step, in turns within one process.

    python -m benchmarks.trainer llama-lora                 # on a GPU, about two minutes
    python -m benchmarks.trainer llama-lora-tiny --device cpu --mode eager

Times are the device's own, so that the host may run ahead of it. Both draw Poisson batches of their own. A turn of the
loop runs inside a callback of the trainer, between two turns of the trainer. Steps are compared with steps of as many
microbatches: how many a batch needs is random, and counts more than what is measured here.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import clipgrad
from benchmarks import finetuned, finetuning
from benchmarks.device import wait
from clipgrad.integrations.huggingface import DPTrainer

COPIES = 32  # of the rows of one batch, in the dataset
WARM = 12  # steps before the first turn: comparisons with the eager step, and the recording, are among them
Times = dict[int, list[float]]
"""Seconds of each step, by the number of its microbatches."""


class Mark:
    """A point in time of the device, which nobody has to wait for."""

    def __init__(self, device: str) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device != "cpu" else None
        if self._event is not None:
            self._event.record()
        self._now = time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds between two points, after the device has reached both."""
        if self._event is None or earlier._event is None:
            return self._now - earlier._now
        return 1e-3 * float(earlier._event.elapsed_time(self._event))


class InTurns(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Times steps of the trainer, and after every ``steps`` of them runs and times as many steps of ``other``.

    Args:
        other: Runs a step, and returns the number of its rows.
        rows: Returns the number of rows of the trainer's last step.
        microbatch: Rows of a microbatch.
        steps: Of a turn.
        device: Of the model.
    """

    def __init__(
        self,
        other: Callable[[], int],
        rows: Callable[[], int],
        microbatch: int,
        steps: int,
        device: str,
    ) -> None:
        self._other, self._rows = other, rows
        self._microbatch, self._steps, self._device = microbatch, steps, device
        self._last = Mark(device)
        self._trainer: list[tuple[Mark, Mark, int]] = []
        self._loop: list[tuple[Mark, Mark, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end of the step, and run a turn of the loop after the last one of a turn."""
        if state.global_step > WARM:
            self._note(self._trainer, self._rows())
        if state.global_step >= WARM and (state.global_step - WARM) % self._steps == 0:
            self._turn()
            for _ in range(self._steps):
                self._note(self._loop, self._other())
            self._turn()

    def _turn(self) -> None:
        wait(self._device)
        self._last = Mark(self._device)

    def _note(self, times: list[tuple[Mark, Mark, int]], rows: int) -> None:
        now = Mark(self._device)
        times.append((self._last, now, -(-rows // self._microbatch)))
        self._last = now

    def times(self) -> tuple[Times, Times]:
        """Return the times of the trainer's steps and of the loop's."""
        wait(self._device)
        found: tuple[Times, Times] = (defaultdict(list), defaultdict(list))
        for noted, times in zip((self._trainer, self._loop), found, strict=True):
            for start, end, microbatches in noted:
                times[microbatches].append(end.seconds_since(start))
        return found


def compared(trainer: Times, loop: Times) -> dict[str, Any]:
    """Median milliseconds for each number of microbatches, and the ratio of a mean step with the same numbers."""
    counts = {n: len(trainer[n]) + len(loop[n]) for n in sorted({*trainer, *loop})}
    # A median of a few steps would be that of the comparisons with the eager step.
    both = [n for n in counts if n and min(len(trainer[n]), len(loop[n])) >= 5]
    row: dict[str, Any] = {}
    means = []
    for kind, times in (("trainer", trainer), ("loop", loop)):
        medians = {n: statistics.median(times[n]) for n in both}
        means.append(sum(counts[n] * medians[n] for n in both) / sum(counts[n] for n in both))
        row[f"{kind}: ms by microbatches"] = {n: round(1e3 * medians[n], 2) for n in both}
    row["steps by microbatches"] = {n: [len(trainer[n]), len(loop[n])] for n in counts}
    row["trainer / loop"] = round(means[0] / means[1], 3)
    return row


def rows_of(batch: finetuned.Batch) -> list[dict[str, Tensor]]:
    """The rows of a batch on the CPU, as a dataset has them, several times."""
    host = {name: value.cpu() for name, value in batch.items()}
    size = len(next(iter(host.values())))
    return [{name: value[i] for name, value in host.items()} for i in range(size)] * COPIES


def bare_loop(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    plan: clipgrad.PrivacyPlan,
    size: int,
    device: str,
    compile: bool | str,
) -> Callable[[], int]:
    """A step on the next batch of the plan, without the trainer."""
    optimizer = clipgrad.DPOptimizer(
        finetuning.adamw(model, device), model, finetuned.loss_fn, plan=plan, microbatch_size=size, compile=compile
    )  # fmt: skip
    pinned = device != "cpu"
    batches: Iterator[Any] = iter(clipgrad.poisson_loader(data, plan=plan, pin_memory=pinned))

    def step() -> int:
        batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
        optimizer.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        return len(batch["input_ids"])

    return step


def measured(name: str, device: str, turns: int, steps: int, mode: bool | str) -> dict[str, Any]:
    """Milliseconds of steps of the trainer and of the loop."""
    setting = finetuned.SETTINGS[name](device)
    data, size = rows_of(setting.batch), len(setting.batch["input_ids"])
    total = WARM + turns * steps
    # Each run has a plan of its own, which counts its batches.
    plan, plan_of_loop = (
        clipgrad.PrivacyPlan(
            num_samples=len(data), expected_batch_size=size, noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-6,
            steps=total + steps,
        )
        for _ in range(2)
    )  # fmt: skip
    other = bare_loop(copy.deepcopy(setting.model), data, plan_of_loop, size, device, mode)
    for _ in range(WARM):
        other()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=size, max_steps=total, save_strategy="no", report_to="none",
            use_cpu=device == "cpu", disable_tqdm=True, optim="adamw_torch_fused" if device != "cpu" else "adamw_torch",
        )  # fmt: skip
        trainer = DPTrainer(setting.model, arguments, train_dataset=data, plan=plan, compile=mode)
        watch = InTurns(other, lambda: trainer._rows_of_step, size, steps, device)
        trainer.add_callback(watch)
        trainer.train()
    return {"setting": name, **compared(*watch.times())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="+", choices=finetuned.SETTINGS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24, help="of a turn")
    parser.add_argument("--mode", default="reduce-overhead", help="compile= of both; eager: none")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32, as in ordinary training on such a GPU
    mode = args.mode != "eager" and args.mode
    for name in args.settings:
        print(json.dumps(measured(name, args.device, args.turns, args.steps, mode)), flush=True)


if __name__ == "__main__":
    main()
