"""Privacy of whole users: rounds as in federated learning, two phases, one ledger.

    python docs/examples/users.py

Each user has some scans of digits, shifted by the habit of the user. A round draws users, clips what each contributes
as a whole, and adds noise once. The second phase uses more users a round and a smaller step. Its plan continues the
ledger of the first, so epsilon covers both.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import clipgrad

USERS, DELTA = 300, 1e-4


def loss_fn(model, images, labels, present):  # of one user: [K, 64], [K], [K]
    each = nn.functional.cross_entropy(model(images), labels, reduction="none")
    return each.where(present, 0).sum() / present.sum()


def train(model, data, users, plan, lr) -> clipgrad.DPOptimizer:
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    optimizer = clipgrad.DPOptimizer(inner, model, loss_fn, plan=plan, keep_batch_dim=False)
    for batch in clipgrad.user_loader(data, users, plan=plan, samples_per_user=4):
        optimizer.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, for tests")
    rounds = 10 if parser.parse_args().quick else 60

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    users = torch.randint(USERS, (len(labels),))
    habits = 0.1 * torch.randn(USERS, 64)
    data = TensorDataset(images + habits[users], labels)
    unit = {"num_samples": int(users.unique().numel()), "unit": "user", "delta": DELTA}

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    first = clipgrad.PrivacyPlan(
        expected_batch_size=60, steps=rounds, noise_multiplier=2.0, max_grad_norm=0.5, **unit
    )
    optimizer = train(model, data, users, first, lr=1.0)
    print(
        f"{first}\nafter phase 1: epsilon {optimizer.epsilon():.2f}, accuracy {accuracy(model, data):.0%}"
    )
    second = clipgrad.PrivacyPlan(
        expected_batch_size=100, steps=rounds // 2, noise_multiplier=2.0, max_grad_norm=0.5, **unit
    ).continuing(optimizer.ledger)
    optimizer = train(model, data, users, second, lr=0.3)
    print(f"after phase 2: epsilon {optimizer.epsilon():.2f}, accuracy {accuracy(model, data):.0%}, "
          f"{optimizer.ledger.steps} rounds in one ledger")  # fmt: skip


def accuracy(model, data) -> float:
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
