"""What ``DPTrainer`` costs beside a bare loop: the same model, plan, batches and step, in turns within one process.

    python -m benchmarks.trainer llama-lora                 # on a GPU, about two minutes
    python -m benchmarks.trainer llama-lora-tiny --device cpu --mode eager

Both draw Poisson batches of their own. A turn of the loop runs inside a callback of the trainer, between two turns of
the trainer. Neither turn counts the other's time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import clipgrad
from benchmarks import finetuning
from clipgrad.integrations.huggingface import DPTrainer

COPIES = 32  # of the rows of one batch, in the dataset
WARM = 12  # steps before the first turn: comparisons with the eager step, and the recording, are among them


class InTurns(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Times steps of the trainer, and after every ``steps`` of them runs and times as many steps of ``other``."""

    def __init__(self, other: Callable[[], None], steps: int, device: str) -> None:
        self._other, self._steps, self._device = other, steps, device
        self._start: float | None = None
        self.trainer: list[float] = []
        self.loop: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a turn of the trainer, if this was its last step, and run a turn of the loop."""
        if state.global_step < WARM or (state.global_step - WARM) % self._steps:
            return
        if self._start is not None:
            self.trainer.append(self._since(self._start) / self._steps)
        begun = self._since(0.0)
        for _ in range(self._steps):
            self._other()
        self.loop.append(self._since(begun) / self._steps)
        self._start = self._since(0.0)

    def _since(self, start: float) -> float:
        finetuning.wait(self._device)
        return time.perf_counter() - start


def rows_of(batch: finetuning.Batch) -> list[dict[str, Tensor]]:
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
) -> Callable[[], None]:
    """A step on the next batch of the plan, without the trainer."""
    optimizer = clipgrad.DPOptimizer(
        finetuning.adamw(model, device), model, finetuning.loss_fn, plan=plan, microbatch_size=size, compile=compile
    )  # fmt: skip
    batches: Iterator[Any] = iter(clipgrad.poisson_loader(data, plan=plan))

    def step() -> None:
        batch = {name: value.to(device) for name, value in next(batches).items()}
        optimizer.backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(name: str, device: str, turns: int, steps: int, mode: bool | str) -> dict[str, Any]:
    """Mean milliseconds of a step in each turn."""
    setting = finetuning.SETTINGS[name](device)
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
    watch = InTurns(other, steps, device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=size, max_steps=total, save_strategy="no", report_to="none",
            use_cpu=device == "cpu", disable_tqdm=True, optim="adamw_torch_fused" if device != "cpu" else "adamw_torch",
        )  # fmt: skip
        trainer = DPTrainer(
            setting.model, arguments, train_dataset=data, plan=plan, compile=mode, callbacks=[watch]
        )
        trainer.train()
    found = {"trainer": watch.trainer, "loop": watch.loop[: len(watch.trainer)]}
    row = {f"{kind}: ms": round(1e3 * statistics.mean(took), 2) for kind, took in found.items()}
    ratios = [ours / theirs for ours, theirs in zip(*found.values(), strict=True)]
    spread = {"least": min(ratios), "median": statistics.median(ratios), "greatest": max(ratios)}
    return {
        "setting": name,
        **row,
        "trainer / loop": round(row["trainer: ms"] / row["loop: ms"], 3),
        **{f"{which} ratio of a turn": round(value, 3) for which, value in spread.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="+", choices=finetuning.SETTINGS)
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
