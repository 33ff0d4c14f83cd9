"""Digits, learnt with independent and with correlated noise at one epsilon: ``python -m benchmarks.correlated_digits``.

For each epsilon both trainings have the same model, steps, batch size, clipping norm, learning rate and seeds, and only
the plan's mechanism differs. It prints a table, and draws ``benchmarks/results/correlated-digits.png``. Noise and
batches are repeatable and so not private. Epsilon is what it would be.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clipgrad import BandedFactorisation, DPOptimizer, PrivacyPlan, SeededNoise, poisson_loader

EPSILONS = (1.0, 2.0, 4.0, 8.0)
STEPS, BATCH, DELTA = 300, 16, 1e-4
LEARNING_RATE, MOMENTUM = 0.02, 0.9
RESULTS = Path(__file__).parent / "results" / "correlated-digits.json"
NAMES = ("independent noise", "correlated noise")
# Epsilon, then the name of the noise: mean accuracy and its standard error.
Results = dict[str, dict[str, tuple[float, float]]]


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0
    )
    return TensorDataset(images[train], labels[train]), images[test], labels[test]


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1, stride=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def loss_fn(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def plan_of(epsilon: float, mechanism: BandedFactorisation | None, samples: int) -> PrivacyPlan:
    return PrivacyPlan.for_epsilon(
        epsilon,
        num_samples=samples,
        expected_batch_size=BATCH,
        steps=STEPS,
        delta=DELTA,
        mechanism=mechanism,
    )


def accuracy(
    plan: PrivacyPlan,
    seed: int,
    data: tuple[TensorDataset, Tensor, Tensor],
    rate: float,
    momentum: float,
) -> float:
    """The test accuracy of one training."""
    train, images, labels = data
    model = model_of(seed)
    plan = plan.with_noise(plan.noise_multiplier)  # a run of its own
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum),
        model,
        loss_fn,
        plan=plan,
        noise=SeededNoise(torch.Generator().manual_seed(1000 + seed)),
    )
    batches = poisson_loader(train, plan=plan, generator=torch.Generator().manual_seed(seed))
    for batch in batches:
        optimizer.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def plot(found: Results, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    epsilons = sorted(float(epsilon) for epsilon in found)
    for shift, name in zip((-0.015, 0.015), NAMES, strict=True):
        means, errors = zip(*(found[f"{epsilon:g}"][name] for epsilon in epsilons), strict=True)
        places = [epsilon * (1 + shift) for epsilon in epsilons]
        bars = [2 * error for error in errors]
        axes.errorbar(places, means, yerr=bars, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.set_xlabel(f"epsilon (delta = {DELTA:g})")
    axes.set_ylabel("test accuracy, mean and two standard errors")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"Handwritten digits: {STEPS} steps on batches of {BATCH}")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--momentum", type=float, default=MOMENTUM)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = data()
    for epsilon in args.epsilons:
        line, row = f"epsilon {epsilon:g}:", {}
        for name, mechanism in zip(NAMES, (None, BandedFactorisation()), strict=True):
            plan = plan_of(epsilon, mechanism, len(digits[0]))
            seeds = range(args.first_seed, args.first_seed + args.seeds)
            accuracies = [accuracy(plan, seed, digits, args.lr, args.momentum) for seed in seeds]
            mean, error = (
                statistics.mean(accuracies),
                statistics.stdev(accuracies) / args.seeds**0.5,
            )
            row[name] = (mean, error)
            bands = "" if plan.mechanism is None else f", {plan.mechanism}"
            line += f"  {name} {mean:.2%} +- {error:.2%} (error {plan.expected_error():.3f}{bands})"
        print(line, flush=True)
        # Several runs of this command, for an epsilon each, may share the file.
        known: Results = json.loads(args.results.read_text()) if args.results.exists() else {}
        known[f"{epsilon:g}"] = row
        args.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        plot(json.loads(args.results.read_text()), args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
