"""A small CNN learns handwritten digits with differential privacy: what ``make demo`` runs.

    python docs/examples/digits.py                        # ends at epsilon = 3
    python docs/examples/digits.py --noise-multiplier 8   # more noise, a smaller epsilon
    python docs/examples/digits.py --help

The data are scikit-learn's 1797 scans of 8x8 pixels. What clipgrad adds to an ordinary training is
all in ``train_privately``; ``train_plainly`` is the same without it. What comes after that trains
both, and a third time with ``vmap(grad)``, and compares accuracy and speed.

Epsilon covers one private training and no more. It doesn't cover the search for the hyperparameters
below, for which this very data was used many times, nor the comparison, whose middle row has no
privacy at all: where the data must stay private, train once. The test images count as public here,
since all that is shown is measured on them.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from _digits_peer import VmapDPOptimizer, samples_per_second
from _digits_show import Outcome, Watch, console, plot, progress_bar, table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import clipgrad
from clipgrad import PrivacyPlan

DELTA = 1e-4  # well below one over the number of training images
LEARNING_RATE = 0.006


def make_model() -> nn.Module:
    # GroupNorm, as BatchNorm would mix the samples, whose gradients then couldn't be told apart.
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1, stride=2),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def loss_fn(model, images, labels):
    return nn.functional.cross_entropy(model(images), labels)


def train_privately(model, data, args, plan, watch, dp=clipgrad.DPOptimizer):
    loader = clipgrad.poisson_loader(data.train, plan=plan, generator=generator(args.seed, 1))
    optimizer = dp(
        torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
        model,
        loss_fn,
        plan=plan,
        noise=noise(args.seed),
    )
    for step, (images, labels) in enumerate(loader, start=1):
        optimizer.backward(images, labels)  # each sample's gradient clipped, then their sum
        optimizer.step()  # noise, once, and Adam
        optimizer.zero_grad()
        watch(step)


def train_plainly(model, data, args, watch):
    chosen = RandomSampler(data.train, num_samples=args.steps * args.batch_size)
    loader = DataLoader(data.train, batch_size=args.batch_size, sampler=chosen)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for step, (images, labels) in enumerate(loader, start=1):
        loss_fn(model, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch(step)


def generator(seed: int | None, purpose: int) -> torch.Generator | None:
    """None, and with it the operating system's randomness, unless a repeatable run was asked for."""
    return None if seed is None else torch.Generator().manual_seed(10 * seed + purpose)


def noise(seed: int | None) -> clipgrad.SeededNoise | None:
    """The default source, or a repeatable one that is not private."""
    draws = generator(seed, 2)
    return None if draws is None else clipgrad.SeededNoise(draws)


# ------------------------------------------------------------------------------- data and privacy


class Digits(NamedTuple):
    train: TensorDataset
    test: TensorDataset


def load() -> Digits:
    digits = load_digits()
    # 16 is the largest value that the format has. The largest that occurs, or a mean, would be
    # computed from private data and so would need noise of its own.
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0
    )
    return Digits(
        TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])
    )


def make_plan(args, num_samples: int) -> PrivacyPlan:
    """All that privacy depends on, said once: loader and optimizer are built from it."""
    numbers = {
        "num_samples": num_samples,
        "expected_batch_size": args.batch_size,
        "steps": args.steps,
        "delta": DELTA,
        "max_grad_norm": args.max_grad_norm,
    }
    if args.noise_multiplier is not None:
        return PrivacyPlan(noise_multiplier=args.noise_multiplier, **numbers)
    return PrivacyPlan.for_epsilon(args.epsilon, **numbers)


def epsilons_of(plan: PrivacyPlan, quick: bool) -> dict[int, float]:
    """Epsilon after each step at which the model is looked at.

    It depends on nothing that happens in the training, and so can be known before.
    """
    every = math.ceil(plan.steps / (4 if quick else 20))
    return {step: plan.epsilon(step) for step in [*range(0, plan.steps, every), plan.steps]}


# ----------------------------------------------------------------------------------- the comparison


def train_all(model, data, args, plan, epsilons) -> dict[str, Outcome]:
    """Three trainings from the same initial weights."""
    private = partial(train_privately, plan=plan)
    trainings = {
        "clipgrad": private,
        "not private": train_plainly,
        "vmap(grad)": partial(private, dp=VmapDPOptimizer),
    }
    outcomes = {}
    with progress_bar() as bar:
        for name, train in trainings.items():
            fresh = copy.deepcopy(model)
            known = dict.fromkeys(epsilons) if train is train_plainly else epsilons
            watch = Watch(bar, name, fresh, data.test, known)
            train(fresh, data, args, watch=watch)
            outcomes[name] = watch.outcome
    return outcomes


def measure_speeds(model, data, args, plan) -> dict[str, float]:
    """Samples per second by training: same model, batch and optimizer; the noise included."""
    images, labels = data.train[: args.batch_size]

    def private_step(dp):
        own = copy.deepcopy(model)
        optimizer = dp(
            torch.optim.Adam(own.parameters(), lr=LEARNING_RATE),
            own,
            loss_fn,
            # Enough steps for the stopwatch, and no loader: nothing of them is kept.
            plan=replace(plan, steps=1000, declared_sampling="one batch again and again"),
        )
        return partial(one_step, partial(optimizer.backward, images, labels), optimizer)

    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(plain.parameters(), lr=LEARNING_RATE)
    steps = {
        "clipgrad": private_step(clipgrad.DPOptimizer),
        "not private": partial(
            one_step, lambda: loss_fn(plain, images, labels).backward(), optimizer
        ),
        "vmap(grad)": private_step(VmapDPOptimizer),
    }
    return samples_per_second(steps, len(labels), rounds=3 if args.quick else 25)


def one_step(backward, optimizer) -> None:
    backward()
    optimizer.step()
    optimizer.zero_grad()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    data = load()
    console.print(f"{len(data.train)} training images, {len(data.test)} test images")
    if args.seed is not None:
        torch.manual_seed(args.seed)
        console.print(
            f"--seed {args.seed}: repeatable, so NOT PRIVATE; epsilon is only what it'd be"
        )
    plan = make_plan(args, len(data.train))
    console.print(str(plan), soft_wrap=True)

    model = make_model()
    epsilons = epsilons_of(plan, args.quick)
    outcomes = train_all(model, data, args, plan, epsilons)
    console.print("measuring speed ...")
    speeds = measure_speeds(model, data, args, plan)
    table(outcomes, speeds, baseline="not private")
    console.print(
        f"epsilon: at delta = {DELTA:g}, of each training alone, without the search for "
        "hyperparameters\n"
        f"speed: median of interleaved steps on {args.batch_size} samples, noise and Adam "
        f"included, {args.threads} thread{'s' if args.threads > 1 else ''}",
        soft_wrap=True,
    )
    plot(outcomes, args.output, delta=DELTA)
    console.print(f"learning curves: {args.output.resolve()}", soft_wrap=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small CNN on handwritten digits privately."
    )
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--epsilon", type=float, default=3.0, help="to end at; default 3")
    noise.add_argument("--noise-multiplier", type=float, help="instead of --epsilon")
    parser.add_argument("--steps", type=int, help="default 300, with --quick 20")
    parser.add_argument("--batch-size", type=int, default=256, help="expected; default 256")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="default 1")
    parser.add_argument("--seed", type=int, help="for a repeatable run, which is NOT PRIVATE")
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    # Images this small gain little from threads, and lose much where other work holds a core.
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 20 if args.quick else 300
    for name in ("steps", "batch_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch_size > 1000:
        parser.error("--batch-size must be at most 1000: there are 1437 images to draw it from")
    if args.epsilon <= 0:
        parser.error("--epsilon must be positive")
    if not args.output.resolve().parent.is_dir():  # better now than after the training
        parser.error(f"--output: there is no folder {args.output.resolve().parent}")
    return args


if __name__ == "__main__":
    main()
