"""Audit a private training: a small network learns digits, and canaries tell what the run gave away.

    python docs/examples/audit.py                 # the bound stays below the claim
    python docs/examples/audit.py --noise 0.25    # a bug: a quarter of the noise that is claimed

Each canary has a parameter of its own, a row of ``probe``, that nothing else touches, and pulls at it
harder than clipping allows. So no canary hides another, and the audit is as sharp as it can be: it
looks at sampling, clipping, noise and accounting of this very loop. Whether a canary takes part is
decided by a secret coin. Every sample is in every batch; the claim is then that of the Gaussian
mechanism, and both of the audit's curves may be held against it.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Subset, TensorDataset

import clipgrad
from clipgrad import accounting, audit

DELTA = 1e-5
NOISE_MULTIPLIER = 4.0
PULL = 5.0


class Network(nn.Module):
    """Any model, and a row per canary."""

    def __init__(self, canaries):
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.nobody = canaries  # the row of samples that are no canaries: it is never trained
        self.probe = nn.Embedding(canaries + 1, 1, padding_idx=canaries)


def loss_fn(model, images, labels, rows):
    # Summed over samples, of which there is one.
    loss = nn.functional.cross_entropy(model.classifier(images), labels, reduction="none")
    return (loss * (rows == model.nobody)).sum() + PULL * model.probe(rows).sum()


class Reduced:
    """A noise source with a planted bug: it adds ``factor`` times the noise that was asked for."""

    def __init__(self, factor):
        self.factor = factor
        self.noise = clipgrad.SystemNoise()

    def add_gaussian_(self, tensors, sigma):
        self.noise.add_gaussian_(tensors, self.factor * sigma)

    def state_dict(self):
        return self.noise.state_dict()

    def load_state_dict(self, state):
        self.noise.load_state_dict(state)


def make_data(m):
    """The digits, then m canaries, and the canaries' coins."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    nobody = torch.full((len(labels),), m)
    dataset = TensorDataset(
        torch.cat([images, torch.zeros(m, 64)]),
        torch.cat([labels, torch.zeros(m, dtype=torch.int64)]),
        torch.cat([nobody, torch.arange(m)]),
    )
    return dataset, audit.Canaries.draw(range(len(labels), len(dataset)))


def train(model, dataset, canaries, steps, noise):
    """An ordinary private training, but for ``kept`` and ``recorder``."""
    kept = Subset(dataset, canaries.training_indices(len(dataset)))
    loader = clipgrad.poisson_loader(kept, sample_rate=1.0, steps=steps)
    optimizer = clipgrad.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        model,
        loss_fn,
        max_grad_norm=1.0,
        noise_multiplier=NOISE_MULTIPLIER,
        expected_batch_size=len(dataset),  # a public constant: len(kept) would tell of the coins
        noise=noise,
    )
    recorder = audit.StepRecorder(optimizer, *dataset[canaries.indices])
    for step, batch in enumerate(loader, start=1):
        loss = optimizer.backward(*batch)
        with recorder:
            optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 4) == 0:
            print(f"step {step:2}/{steps}  loss {loss:.3f}", flush=True)
    return recorder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--noise", type=float, default=1.0, help="share of the claimed noise")
    parser.add_argument("--quick", action="store_true", help="few canaries, for tests")
    args = parser.parse_args()
    m, steps = (500, 16) if args.quick else (2000, 16)

    dataset, canaries = make_data(m)
    recorder = train(Network(m), dataset, canaries, steps, Reduced(args.noise))
    claim = accounting.epsilon(
        noise_multiplier=NOISE_MULTIPLIER, sample_rate=1.0, steps=steps, delta=DELTA
    )
    print(f"claimed: epsilon = {claim:.2f} at delta = {DELTA:g}")
    most = 0.0
    for curve in ("approximate", "gaussian"):
        result = audit.lower_bound(recorder.scores(), canaries.included, delta=DELTA, curve=curve)
        print(f"found, against the {curve} curve:\n    {result}")
        most = max(most, result.epsilon)
    if most > claim:
        print("This training is NOT as private as claimed.")
    else:
        print("No contradiction. That is no proof of privacy: a better attack may find one.")


if __name__ == "__main__":
    main()
