"""Time clipped and standard steps on copies of an optimizer, in alternation."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clipgrad._phases import PHASES, Phase, listening, phase
from clipgrad.optimizer import DPOptimizer
from clipgrad.profile._report import StepProfile

Clock = Callable[[], float]
Step = Callable[[], None]

STANDARD_PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


def profile_step(
    optimizer: DPOptimizer, *batch: Any, rounds: int = 10, warm_up: int = 2
) -> StepProfile:
    """Measure the time of each phase of a clipped step, and of the standard step of the same model.

    The steps run on two deep copies of ``optimizer`` with its model, wrapped optimizer and noise source. So weights,
    states and RNG states of the originals do not change, nor does PyTorch's global generator. The copies take memory
    for two more models with their optimizer states. Every round runs four steps: each kind as in training, and each
    kind phase by phase.

    Times are **not private**: they can depend on the samples (one whose gradient is not finite, for example), so the
    table must be kept as confidential as ``optimizer.diagnostics``.

    No other thread of the process may run a clipped step meanwhile, since its phases would be counted.

    Args:
        optimizer: An optimizer as in training, between two logical batches.
        *batch: The arguments of ``optimizer.backward``, with at least one sample.
        rounds: Number of steps of each kind for the medians.
        warm_up: Number of earlier rounds that are not counted; the first step of an optimizer creates its state.

    Returns:
        Medians in seconds; ``print`` them for a table.

    Raises:
        ValueError: If an argument is out of range, or the batch is missing or empty.
        TypeError: If ``optimizer`` is not a ``DPOptimizer``.
        RuntimeError: If a logical batch is unfinished, the optimizer cannot be copied, or a profile is running already.

    Examples:
        >>> import torch, clipgrad
        >>> model = torch.nn.Linear(3, 1)
        >>> def loss_fn(model, x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> optimizer = clipgrad.DPOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     model,
        ...     loss_fn,
        ...     max_grad_norm=1.0,
        ...     noise_multiplier=1.0,
        ...     expected_batch_size=8,
        ... )
        >>> profile = clipgrad.profile_step(optimizer, torch.randn(8, 3), torch.randn(8, 1))
        >>> profile.batch_size, sorted(profile.standard_phases)
        (8, ['backward', 'forward', 'optimizer'])
        >>> print(profile)
        phase                 clipped  share  standard  extra
        ...
    """
    return profile_with(time.perf_counter, optimizer, batch, rounds=rounds, warm_up=warm_up)


def profile_with(
    clock: Clock, optimizer: DPOptimizer, batch: tuple[Any, ...], *, rounds: int, warm_up: int
) -> StepProfile:
    """Run ``profile_step`` with any clock; tests pass a simulated clock."""
    _check(optimizer, batch, rounds, warm_up)
    size = _batch_size(batch)
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    watch = Stopwatch(clock, device)
    standard = _standard_step(_copy_optimizer(optimizer), batch)
    clipped = _clipped_step(_copy_optimizer(optimizer), batch)
    whole: dict[Step, list[float]] = {standard: [], clipped: []}
    parts: dict[Step, list[dict[Phase, float]]] = {standard: [], clipped: []}
    # Dropout changes PyTorch's global RNG states.
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), torch.enable_grad():
        for _ in range(warm_up):
            standard()
            clipped()
        for _ in range(rounds):
            for step in (standard, clipped):
                whole[step].append(watch.whole(step))
            for step in (standard, clipped):
                parts[step].append(watch.by_phase(step))
    return StepProfile(
        phases=_medians(PHASES, parts[clipped]),
        standard_phases=_medians(STANDARD_PHASES, parts[standard]),
        clipped=median(whole[clipped]),
        standard=median(whole[standard]),
        batch_size=size,
        microbatch_size=optimizer._clipper.options.microbatch_size,
        device=str(device),
        threads=torch.get_num_threads(),
        rounds=rounds,
    )


class Stopwatch:
    """This class times steps as a whole or by phase; the time of an inner phase does not count for the outer phase.

    The device is synchronised before the clock is read, so that each kernel counts for its own phase.
    """

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock = clock
        self._device = device
        self._open: list[Phase] = []
        self._seconds: dict[Phase, float] = {}
        self._since = 0.0

    def whole(self, step: Step) -> float:
        start = self._now()
        step()
        return self._now() - start

    def by_phase(self, step: Step) -> dict[Phase, float]:
        """Return seconds by phase; time outside all marked phases counts as bookkeeping."""
        self._open, self._seconds = [], {}
        with listening(self), phase("bookkeeping"):
            step()
        return self._seconds

    def __call__(self, phase: Phase | None) -> None:
        """Credit the running phase, and begin ``phase`` or, if it is None, end the running one."""
        now = self._now()
        if self._open:
            running = self._open[-1]
            self._seconds[running] = self._seconds.get(running, 0.0) + now - self._since
        self._since = now
        if phase is None:
            self._open.pop()
        else:
            self._open.append(phase)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self._clock()


def _clipped_step(optimizer: DPOptimizer, batch: tuple[Any, ...]) -> Step:
    def step() -> None:
        optimizer.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _standard_step(optimizer: DPOptimizer, batch: tuple[Any, ...]) -> Step:
    model, loss_fn, inner = optimizer.model, optimizer.loss_fn, optimizer.inner
    owned = {id(p) for group in inner.param_groups for p in group["params"]}
    for parameter in model.parameters():
        if id(parameter) not in owned:  # the clipped step treats it as a constant
            parameter.requires_grad_(False)

    def step() -> None:
        with phase("forward"):
            loss = loss_fn(model, *batch)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            inner.step()
            inner.zero_grad()

    return step


def _medians(names: Sequence[Phase], rounds: Sequence[dict[Phase, float]]) -> dict[str, float]:
    return {name: median(seconds.get(name, 0.0) for seconds in rounds) for name in names}


def _copy_optimizer(optimizer: DPOptimizer) -> DPOptimizer:
    try:
        twin = copy.deepcopy(optimizer)
    except Exception as error:
        raise RuntimeError(
            "profile_step: optimizer cannot be copied with its model, loss_fn and noise source, and the profile would "
            f"change the original: {error} Profile a fresh optimizer, before its first backward, or one without the "
            "part that refuses copy.deepcopy."
        ) from error
    twin._account = None  # steps of the copy release nothing, so the batch needs no receipt
    return twin


def _check(optimizer: object, batch: tuple[Any, ...], rounds: int, warm_up: int) -> None:
    if not isinstance(optimizer, DPOptimizer):
        raise TypeError(
            f"optimizer must be a clipgrad.DPOptimizer, got {type(optimizer).__name__}; wrap it as in training."
        )
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds must be a positive integer, got {rounds!r}.")
    if type(warm_up) is not int or warm_up < 0:
        raise ValueError(
            f"warm_up must be a non-negative integer, got {warm_up!r}; with 0, the work of the first step is counted."
        )
    if not batch:
        raise ValueError(
            "profile_step needs the batch, as loss_fn takes it after the model: profile_step(optimizer, *batch)."
        )
    if optimizer._pending.unfinished:
        raise RuntimeError(
            "profile_step: optimizer is inside an unfinished logical batch, between backward and step, so its next "
            "step is not a whole step. Call optimizer.step() or optimizer.zero_grad() first."
        )


def _batch_size(batch: tuple[Any, ...]) -> int:
    """Return the batch size of the first tensor; ``backward`` checks the rest of the batch."""
    size = next((x.shape[0] for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), None)
    if size is None:
        raise ValueError(
            "the batch holds no tensor with a batch axis; pass the samples as tensors whose first axis is the batch."
        )
    if size == 0:
        raise ValueError(
            "the batch holds 0 samples, and its times would not represent other steps; pass a batch of the size that "
            "training uses."
        )
    return int(size)
