"""A GAN of which only the discriminator sees private data, so only it is trained privately.

    python docs/examples/gan.py

The generator learns from the discriminator alone. What is computed from a private result is private as well, so the
generator needs neither clipping nor noise. The private points lie on a ring.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

import clipgrad


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
                         nn.Linear(64, outputs))  # fmt: skip


def discriminator_loss(discriminator, real, fake):
    """Of one private point, and one fake point that goes with it."""
    return softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for tests")
    steps = 20 if parser.parse_args().quick else 1500

    torch.manual_seed(0)
    angles = 2 * torch.pi * torch.rand(20_000)
    ring = torch.stack([angles.cos(), angles.sin()], 1) + 0.05 * torch.randn(20_000, 2)
    plan = clipgrad.PrivacyPlan(
        num_samples=len(ring), expected_batch_size=256, steps=steps, delta=1e-6, noise_multiplier=0.8
    )  # fmt: skip
    generator, discriminator = network(4, 2), network(2, 1)
    ordinary = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    private = clipgrad.DPOptimizer(
        torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
        discriminator,
        discriminator_loss,
        plan=plan,
    )
    for (real,) in clipgrad.poisson_loader(TensorDataset(ring), plan=plan):
        with torch.no_grad():
            fake = generator(torch.randn(len(real), 4))
        private.backward(real, fake)
        private.step()
        private.zero_grad()

        ordinary.zero_grad()
        softplus(-discriminator(generator(torch.randn(256, 4)))).mean().backward()
        ordinary.step()
        private.zero_grad()  # the generator's loss left gradients in the discriminator
    with torch.no_grad():
        radii = generator(torch.randn(2000, 4)).norm(dim=1)
    print(
        f"epsilon {private.epsilon():.2f} after {private.ledger.steps} steps of the discriminator"
    )
    print(
        f"radius of generated points: {radii.mean():.2f} +- {radii.std():.2f} (the ring's is 1.00 +- 0.05)"
    )


if __name__ == "__main__":
    main()
