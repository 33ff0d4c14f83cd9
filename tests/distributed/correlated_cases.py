"""Runs with correlated noise, whose gradients are nothing else; also runs that are stopped and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import clipgrad
from clipgrad import BandedFactorisation, DPOptimizer, PrivacyPlan
from clipgrad.distributed import buckets

SIDE, BANDS, STEPS, SAMPLES = 60, 4, 12, 40
Wrap = Callable[[nn.Module], None] | None


def nothing(model: nn.Module, x: Tensor) -> Tensor:
    """A loss without gradient, so that steps release noise alone."""
    return 0.0 * model(x).sum()


# A bias has a bucket of its own. The processes serve other tests too.
small_buckets = patch.object(buckets, "_BUCKET_BYTES", 400)


class Run:
    """A training, and the file of its rank."""

    def __init__(self, wrap: Wrap) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, SIDE + 1))
        if wrap is not None:
            wrap(self.model)
        self.plan = PrivacyPlan(
            num_samples=SAMPLES,
            expected_batch_size=8.0,
            steps=STEPS,
            delta=1e-3,
            noise_multiplier=2.0,
            accountant="rdp",
            mechanism=BandedFactorisation(BANDS, "square_root"),
        )
        data = torch.utils.data.TensorDataset(torch.randn(SAMPLES, SIDE))
        self.loader = clipgrad.poisson_loader(data, plan=self.plan)
        inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = DPOptimizer(inner, self.model, nothing, plan=self.plan)
        self.parts: dict[str, Any] = {
            "model": self.model, "optimizer": self.optimizer, "loader": self.loader
        }  # fmt: skip

    def until(self, step: int) -> Tensor:
        """Noise of the steps until then, ``[steps, values]``, in units of sigma."""
        found = []
        for (x,) in self.loader:
            self.optimizer.backward(x)
            sigma = self.optimizer.sigma
            self.optimizer.step()
            gradients: list[Any] = [p.grad for p in self.model.parameters()]
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
            found.append(torch.cat([g.flatten() for g in whole]).double() * 8.0 / sigma)
            self.optimizer.zero_grad()
            if self.optimizer.ledger.steps == step:
                break
        return torch.stack(found)


@small_buckets
def whole_run(rank: int, size: int, wrap: Wrap = None) -> tuple[Tensor, int, float]:
    """The noise of a run, the values that this rank keeps of the past, and epsilon."""
    run = Run(wrap)
    found = run.until(STEPS)
    kept = run.optimizer.state_dict()["clipgrad"]["noise"]["past"].values()
    return found, sum(tensor.numel() for tensor in kept), run.optimizer.epsilon()


@small_buckets
def stopped(rank: int, size: int, folder: str, wrap: Wrap = None) -> Tensor:
    """The noise of a run that is stopped after some steps and goes on from the files of its ranks."""
    file = Path(folder, f"rank-{rank}.pt")
    before = Run(wrap)
    first = before.until(5)
    clipgrad.save_checkpoint(file, before.parts)
    assert file.stat().st_mode & 0o777 == 0o600
    after = Run(wrap)
    assert clipgrad.load_checkpoint(file, after.parts)
    return torch.cat([first, after.until(STEPS)])


@small_buckets
def go_on(rank: int, size: int, folder: str, writer: int, wrap: Wrap = None) -> None:
    """One more step from a file that was written by this rank or another one."""
    run = Run(wrap)
    state = torch.load(Path(folder, f"rank-{(rank + writer) % 2}.pt"))["parts"]
    run.optimizer.load_state_dict(state["optimizer"])
    run.loader.load_state_dict(state["loader"])
    run.until(6)
