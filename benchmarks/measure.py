"""Times of the modes of one row, interleaved round by round in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.step import Step

WARM_UP = 1
FEWEST_ROUNDS = 5


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
    that none always runs in the wake of the same neighbour. Warm-up rounds come before and are not kept.

    Args:
        steps: Steps that have run at least once.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: Time to spend; it decides the number of rounds, at least ``FEWEST_ROUNDS``.
        most_rounds: No more rounds than this.
        on_step: Called after each step with its name, the steps done and the steps to come in all.

    Returns:
        By name, one time per round; the same index is the same round.
    """
    names = list(steps)
    start = time.perf_counter()
    for _ in range(WARM_UP):
        for step in steps.values():
            timed(step, device)
    a_round = (time.perf_counter() - start) / WARM_UP
    rounds = max(FEWEST_ROUNDS, min(most_rounds, int(seconds / max(a_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        gc.collect()  # a step's own garbage is its own cost, its neighbours' is not
        shift = index % len(names)
        for position, name in enumerate(names[shift:] + names[:shift]):
            times[name].append(timed(steps[name], device))
            on_step(name, index * len(names) + position + 1, rounds * len(names))
    return times
