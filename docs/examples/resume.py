"""A private training that is killed again and again, and loses neither steps nor budget.

    python docs/examples/resume.py

The parent starts the training in another process and kills it in the middle of a step. The next process goes on from
the last checkpoint: the ledger, the position in the run and the optimizer's state are in it. Noise and batches are
drawn afresh, so that no noise is used twice.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import clipgrad


def loss_fn(model, images, labels):
    return nn.functional.cross_entropy(model(images), labels)


def train(path: Path, steps: int, dies_at: int) -> None:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    plan = clipgrad.PrivacyPlan(
        num_samples=len(data), expected_batch_size=128, steps=steps, delta=1e-5, noise_multiplier=1.0,
        accountant="rdp",
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = clipgrad.DPOptimizer(inner, model, loss_fn, plan=plan)
    loader = clipgrad.poisson_loader(data, plan=plan)
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    clipgrad.load_checkpoint(path, parts)
    done = optimizer.ledger.steps
    print(f"from step {done}, epsilon {optimizer.epsilon() if done else 0:.2f}", flush=True)
    for step, (x, y) in enumerate(loader, start=done + 1):
        optimizer.backward(x, y)
        if step == dies_at:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        optimizer.step()
        optimizer.zero_grad()
        clipgrad.save_checkpoint(path, parts)
    accuracy = (model(images).argmax(1) == data.tensors[1]).float().mean()
    print(f"done: step {optimizer.ledger.steps}, epsilon {optimizer.epsilon():.2f}, "
          f"planned {plan.epsilon():.2f}, accuracy {accuracy:.0%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for tests")
    parser.add_argument(
        "--worker", nargs=3, metavar=("PATH", "STEPS", "DIES_AT"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.worker:
        path, steps, dies_at = args.worker
        return train(Path(path), int(steps), int(dies_at))
    steps = 10 if args.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        for dies_at in (steps // 2, 0):
            command = [
                sys.executable,
                __file__,
                "--worker",
                f"{folder}/run.pt",
                str(steps),
                str(dies_at),
            ]
            killed = subprocess.run(command).returncode
            if killed:
                print(f"killed in step {dies_at}", flush=True)


if __name__ == "__main__":
    main()
