"""A training that kills itself with SIGKILL at one point of one step, and goes on from its checkpoint when run again.

    python tests/killed_training.py FOLDER STEPS [POINT STEP]

Every line of its log is one JSON object, written and flushed before the point that it speaks of.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clipgrad
from clipgrad import checkpoint

POINTS = ("backward", "noise", "inner step", "half a file", "before the rename")


class Killer:
    """Kills the process at a point of a step; before that it only counts."""

    def __init__(self, log: Path, point: str | None, step: int) -> None:
        self.log, self.point, self.at, self.step = log, point, step, 0

    def tell(self, **said: Any) -> None:
        with self.log.open("a") as file:
            print(json.dumps(said), file=file, flush=True)

    def reach(self, point: str) -> None:
        if point == self.point and self.step == self.at:
            self.tell(killed=point, step=self.step)
            os.kill(os.getpid(), signal.SIGKILL)


class Watched:
    """The private noise source; tells what it drew, as only a test may."""

    def __init__(self, killer: Killer) -> None:
        self._source, self._killer = clipgrad.SystemNoise(), killer

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        before = float(tensors[0].flatten()[0])
        self._source.add_gaussian_(tensors, sigma)
        self._killer.tell(noise=float(tensors[0].flatten()[0]) - before, step=self._killer.step)
        self._killer.reach("noise")

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state)


def plan_of(steps: int) -> clipgrad.PrivacyPlan:
    return clipgrad.PrivacyPlan(
        num_samples=64,
        expected_batch_size=8,
        steps=steps,
        delta=1e-3,
        noise_multiplier=1.0,
        accountant="rdp",
    )


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def killable(save: Callable[..., None], killer: Killer) -> Callable[..., None]:
    """``torch.save`` that may die with half of the file written."""

    def saving(state: Any, file: Any) -> None:
        save(state, file)
        if killer.point == "half a file" and killer.step == killer.at:
            file.truncate(file.tell() // 2)
        file.flush()
        killer.reach("half a file")

    return saving


def main(folder: Path, steps: int, point: str | None, step: int) -> None:
    torch.manual_seed(0)
    killer = Killer(folder / "log.jsonl", point, step)
    data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
    plan = plan_of(steps)
    loader = clipgrad.poisson_loader(data, plan=plan)
    model = nn.Linear(3, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = clipgrad.DPOptimizer(inner, model, loss_fn, plan=plan, noise=Watched(killer))
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    path = folder / "run.pt"
    resumed = clipgrad.load_checkpoint(path, parts)
    killer.tell(started=True, resumed=resumed, steps=optimizer.ledger.steps)

    inner.register_step_pre_hook(lambda *_: killer.reach("inner step"))
    checkpoint.torch.save = killable(torch.save, killer)  # type: ignore[attr-defined]
    checkpoint._replace_file = watched_rename(killer)
    for x, y in loader:
        killer.step = optimizer.ledger.steps + 1
        optimizer.backward(x, y)
        killer.reach("backward")
        optimizer.step()
        optimizer.zero_grad()
        clipgrad.save_checkpoint(path, parts)
        killer.tell(saved=True, steps=optimizer.ledger.steps, epsilon=optimizer.epsilon())
    killer.tell(finished=True, steps=optimizer.ledger.steps, epsilon=optimizer.epsilon())


def watched_rename(killer: Killer) -> Callable[[Path, Path], None]:
    def put(beside: Path, path: Path) -> None:
        killer.reach("before the rename")
        beside.replace(path)

    return put


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        Path(arguments[0]),
        int(arguments[1]),
        arguments[2] if len(arguments) > 2 else None,
        int(arguments[3]) if len(arguments) > 3 else 0,
    )
