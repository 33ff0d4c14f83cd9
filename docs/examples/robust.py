"""Clipping without privacy: a regression that a few wild samples cannot spoil.

    python docs/examples/robust.py

``noise_multiplier=0`` clips each sample's gradient and adds no noise. There is no privacy and no epsilon, but a sample
with a huge error pulls no harder than others.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import clipgrad


def loss_fn(model, x, y):
    return nn.functional.mse_loss(model(x), y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for tests")
    steps = 150 if parser.parse_args().quick else 500

    torch.manual_seed(0)
    truth = torch.randn(5, 1)
    x = torch.randn(400, 5)
    y = x @ truth + 0.1 * torch.randn(400, 1)
    wild = torch.randperm(400)[:40]
    y[wild] = 50.0  # a tenth of the labels is wrong

    plain, robust = nn.Linear(5, 1), nn.Linear(5, 1)
    robust.load_state_dict(plain.state_dict())
    ordinary = torch.optim.SGD(plain.parameters(), lr=0.2)
    clipped = clipgrad.DPOptimizer(
        torch.optim.SGD(robust.parameters(), lr=0.2),
        robust,
        loss_fn,
        max_grad_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=len(x),
    )
    for _ in range(steps):
        ordinary.zero_grad()
        loss_fn(plain, x, y).backward()
        ordinary.step()
        clipped.backward(x, y)
        clipped.step()
        clipped.zero_grad()
    for name, model in {"ordinary": plain, "clipped": robust}.items():
        error = (model.weight.T - truth).norm() / truth.norm()
        print(
            f"{name:9} relative error of the weights {error:.3f}, bias {model.bias.item():.2f} (true 0)"
        )
    print(
        f"share of samples that were clipped in the last step: {clipped.diagnostics.clipped_fraction:.0%}"
    )


if __name__ == "__main__":
    main()
