"""Run ``python -m clipgrad.profile``: print the table of ``profile_step`` for a training script or an example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from clipgrad.optimizer import DPOptimizer
from clipgrad.profile import profile_step

Factory = Callable[[], Any]  # users write it, so its return value is checked

_EXAMPLE_BATCH = 32

_EPILOG = """\
A factory is a function of yours that takes no arguments:

    # train.py
    def make():
        model = ...
        optimizer = clipgrad.DPOptimizer(torch.optim.AdamW(model.parameters()), model, loss_fn, ...)
        return optimizer, (images, labels)    # what loss_fn takes after the model

    python -m clipgrad.profile train:make

Nothing that it returns is changed. The times are not private.
"""


def example() -> tuple[DPOptimizer, tuple[Tensor, Tensor]]:
    """Return a small CNN with AdamW, and images of the shape ``[32, 3, 32, 32]``."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    optimizer = DPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        model,
        lambda model, images, labels: nn.functional.cross_entropy(model(images), labels),
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=_EXAMPLE_BATCH,
    )
    pixels = _EXAMPLE_BATCH * 3 * 32 * 32
    images = torch.arange(pixels).sin().view(_EXAMPLE_BATCH, 3, 32, 32)  # the values do not matter
    return optimizer, (images, torch.arange(_EXAMPLE_BATCH) % 10)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse ``arguments`` (default: those of the command line), measure, and print the table."""
    parser = _parser()
    given = parser.parse_args(arguments)
    factory = example if given.factory is None else _load(parser, given.factory)
    on_device = nullcontext() if given.device is None else _device(parser, given.device)
    with on_device:
        optimizer, batch = _make_optimizer(parser, factory, given.factory)
    if given.factory is None:
        _write(
            "This is an example, a small CNN on 32x32 images; see --help to profile your own step.\n"
        )
    profile = profile_step(optimizer, *batch, rounds=given.rounds, warm_up=given.warm_up)
    _write(str(profile))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clipgrad.profile",
        description="Show the time of each phase of a clipped training step, next to the standard step.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "factory",
        nargs="?",
        metavar="module:factory",
        help="returns (optimizer, batch); default: an example, a small CNN with a batch of 32",
    )
    parser.add_argument(
        "--rounds", type=_count(1), default=10, help="steps of each kind (default: 10)"
    )
    parser.add_argument(
        "--warm-up", type=_count(0), default=2, help="rounds that are not measured (default: 2)"
    )
    parser.add_argument(
        "--device", help="PyTorch's default device while the factory runs, such as cuda"
    )
    return parser


def _count(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text!r}"
            )
        return int(text)

    return integer


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a PyTorch without CUDA asserts
        parser.error(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}")
    return device


def _load(parser: argparse.ArgumentParser, target: str) -> Factory:
    module, _, name = target.partition(":")
    if not module or not name:
        parser.error(f"{target!r} is not of the form module:factory, such as train:make")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but it imports a module that does not
        parser.error(
            f"{target!r}: there is no module {module!r} here; run from the folder that holds it"
        )
    factory: Factory | None = getattr(loaded, name, None)
    if not callable(factory):
        parser.error(f"{target!r}: module {module!r} has no function {name!r}")
    return factory


def _make_optimizer(
    parser: argparse.ArgumentParser, factory: Factory, target: str
) -> tuple[DPOptimizer, Sequence[Any]]:
    made = factory()
    if (
        not (isinstance(made, tuple) and len(made) == 2)
        or not isinstance(made[0], DPOptimizer)
        or not isinstance(made[1], tuple | list)
    ):
        parser.error(
            f"{target!r} must return (optimizer, batch): a clipgrad.DPOptimizer and the tuple of arguments of loss_fn "
            f"after the model; it returned {_describe(made)}"
        )
    return made


def _describe(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
