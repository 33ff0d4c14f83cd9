"""Times of the modes of one row, interleaved round by round in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.step import Step

FEWEST_ROUNDS = 5
SLOW = 8
SLOW_ROUNDS = 3
"""A step ``SLOW`` times as slow as the fastest runs in so few rounds, or it would eat the time of the others."""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, device: str) -> float:
    """Seconds of one step, the device's work included.

    A step that runs in a process of its own (a peer in another environment) times itself there.
    """
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    elapsed = time.perf_counter() - start
    own: Callable[[], float] | None = getattr(step, "seconds", None)
    return elapsed if own is None else own()


def interleaved(
    steps: Mapping[str, Step],
    device: str,
    *,
    seconds: float,
    most_rounds: int,
    on_step: Callable[[str, int, int], None] = lambda name, done, rounds: None,
) -> dict[str, list[float]]:
    """Seconds of every step in every round.

    A round runs each step once, so that the machine's moods hit all alike; each round starts with another step, so
    that none always runs in the wake of the same neighbour. A warm-up round comes before and is not kept.

    Args:
        steps: Steps that have run at least once.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: Time to spend; it decides the number of rounds, at least ``FEWEST_ROUNDS``.
        most_rounds: No more rounds than this.
        on_step: Called after each step with its name, the steps done and the steps to come in all.

    Returns:
        By name, one time per round; the same index is the same round. Slow steps have fewer.
    """
    warm = {name: timed(step, device) for name, step in steps.items()}
    quick = [name for name, taken in warm.items() if taken < SLOW * min(warm.values())]
    slow_rounds = FEWEST_ROUNDS if len(quick) == len(steps) else SLOW_ROUNDS
    left = seconds - slow_rounds * sum(warm.values())
    more = int(left / max(sum(warm[name] for name in quick), 1e-9))
    more = max(FEWEST_ROUNDS - slow_rounds, min(most_rounds - slow_rounds, more))
    rounds = [list(steps)] * slow_rounds + [quick] * more
    in_all, done = sum(map(len, rounds)), 0
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index, names in enumerate(rounds):
        gc.collect()  # a step's own garbage is its own cost, its neighbours' is not
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(timed(steps[name], device))
            done += 1
            on_step(name, done, in_all)
    return times
