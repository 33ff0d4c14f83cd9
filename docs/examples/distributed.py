"""A small network learns handwritten digits privately, on one process or on several.

    python docs/examples/distributed.py                                  # one process
    torchrun --nproc-per-node=2 docs/examples/distributed.py             # two, each with the whole model
    torchrun --nproc-per-node=2 docs/examples/distributed.py --shard     # two, each with half of every parameter
    torchrun --nproc-per-node=2 --max-restarts=3 docs/examples/distributed.py --checkpoints runs/digits

Several processes need one line more than one process: ``init_process_group``. The loader then samples from the part of
the data that belongs to its rank, and the optimizer adds up the clipped sums of all ranks. Plan, noise and epsilon are
those of one run. Each rank draws the noise of its own part of the coordinates, so nothing secret is shared.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import clipgrad


def loss_fn(model, images, labels):
    return nn.functional.cross_entropy(model(images), labels)


def train(args) -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    plan = clipgrad.PrivacyPlan.for_epsilon(
        8.0,
        num_samples=len(dataset),
        expected_batch_size=256,  # of all ranks together
        steps=args.steps,
        delta=1e-4,
        accountant="rdp",
    )
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    if args.shard:
        fully_shard(model)
    optimizer = clipgrad.DPOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01), model, loss_fn, plan=plan
    )
    loader = clipgrad.poisson_loader(dataset, plan=plan)
    state = clipgrad.RunState(model, optimizer, loader)
    if args.checkpoints and state.load(args.checkpoints):
        say(f"goes on after step {optimizer.ledger.steps}")
    for own_images, own_labels in loader:  # this rank's part of the batch, sometimes empty
        optimizer.backward(own_images, own_labels)
        optimizer.step()
        optimizer.zero_grad()
        if args.checkpoints and optimizer.ledger.steps % 10 == 0:
            state.save(args.checkpoints)
    with torch.no_grad():  # every rank has to come, since a sharded model gathers its parameters
        accuracy = (model(images).argmax(1) == dataset.tensors[1]).float().mean()
    say(
        f"steps {optimizer.ledger.steps}  epsilon {optimizer.epsilon():.2f}  accuracy {accuracy:.1%}"
    )


def say(text: str) -> None:
    """Print once, not on every rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train on handwritten digits on several processes."
    )
    parser.add_argument("--steps", type=int, help="default 200, with --quick 20")
    parser.add_argument("--shard", action="store_true", help="FSDP2; only under torchrun")
    parser.add_argument("--checkpoints", help="a folder that all ranks can reach")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    args = parser.parse_args()
    args.steps = args.steps or (20 if args.quick else 200)
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group(timeout=timedelta(minutes=2))  # the one line
    train(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
