"""Test the covariance of correlated noise, its saved state, and its refusals."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipgrad.errors import PrivacyBudgetError
from clipgrad.factorisation.buffered import BufferedToeplitz
from clipgrad.factorisation.optimise import optimised
from clipgrad.factorisation.strategy import banded
from clipgrad.factorisation.toeplitz import column_norm, inverse, square_root
from clipgrad.noise import NoiseSource, SystemNoise, cpu, keys, recurrence, rows
from clipgrad.noise.correlated import CorrelatedNoise
from clipgrad.noise.step_noise import StepSums
from tests.dp_tools import through_a_file
from tests.factorisation.oracle import matrix
from tests.nightly import some
from tests.noise_checks import seeded

COLUMNS = [[1.0], [1.0, 0.5], square_root(5).tolist(), [1.0, -0.4, 0.3], square_root(16).tolist()]


class Recorded:
    """This source returns the noise of a seeded source and records it as Z."""

    def __init__(self) -> None:
        self.inner = seeded()
        self.drawn: list[Tensor] = []

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        for tensor in tensors:
            noise = torch.zeros(tensor.shape, dtype=torch.float64)
            self.inner.add_gaussian_([noise], sigma)
            self.drawn.append(noise.flatten())
            tensor.add_(noise)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


def noise_of(source: NoiseSource, column: Sequence[float]) -> CorrelatedNoise:
    return CorrelatedNoise(source, banded(np.array(column)), f"{len(column)}-banded")


def step(
    noise: CorrelatedNoise, number: int, sums: list[Tensor], *, sigma: float = 1.0, **changes: Any
) -> list[Tensor]:
    options: dict[str, Any] = {"names": [f"p{i}" for i in range(len(sums))], "divisor": 1.0}
    options |= {"in_place": True, **changes}
    return noise.next(StepSums(sums, number, sigma=sigma, **options))


def run(noise: CorrelatedNoise, steps: range, size: int, **options: Any) -> Tensor:
    """Return the noise of some steps, ``[steps, size]``."""
    dtype = options.pop("dtype", torch.float32)
    return torch.stack(
        [step(noise, t, [torch.zeros(size, dtype=dtype)], **options)[0] for t in steps]
    )


# ------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_step_adds_its_row_of_the_inverse_times_fresh_noise(
    column: list[float], dtype: torch.dtype
) -> None:
    source = Recorded()
    steps, sigma, divisor = 40, 1.5, 4.0
    noise = noise_of(source, column)
    shapes = [(3, 2), (), (5,), (0,)]
    found = []
    for t in range(steps):
        sums = [torch.full(shape, 0.25, dtype=dtype) for shape in shapes]
        means = step(noise, t, sums, sigma=sigma, divisor=divisor)
        assert [mean.shape for mean in means] == [torch.Size(shape) for shape in shapes]
        found.append(torch.cat([mean.flatten().double() for mean in means]))
    drawn = torch.stack(source.drawn).numpy()  # a step draws once for all parameters
    assert drawn.shape == (steps, 12)
    inverted = np.linalg.inv(matrix(column, steps))
    expected = (0.25 + inverted @ drawn) / divisor
    error = np.abs(torch.stack(found).numpy() - expected).max()
    assert error < (1e-9 if dtype is torch.float64 else 3e-6)
    # Z has the deviation that makes the longest column of C one sensitivity long.
    assert np.std(drawn) == pytest.approx(sigma * column_norm(np.array(column)), rel=0.2)


@pytest.mark.parametrize("ahead", [True, False])
def test_the_covariance_over_64_steps_is_that_of_the_inverse(ahead: bool) -> None:
    steps, size, sigma, column = 64, 20_000, 2.0, optimised(6, 64)
    source: NoiseSource = SystemNoise() if ahead else seeded()
    found = run(noise_of(source, column.tolist()), range(steps), size, sigma=sigma).double()
    inverted = torch.from_numpy(np.linalg.inv(matrix(column, steps)))
    wanted = inverted @ inverted.T * (sigma * column_norm(column)) ** 2
    covariance = found @ found.T / size
    spread = torch.sqrt((torch.outer(wanted.diag(), wanted.diag()) + wanted**2) / size)
    deviations = (covariance - wanted) / spread
    assert deviations.abs().max() < 8
    # The check would notice independent noise of the same size in each step.
    assert ((torch.diag(wanted.diag()) - wanted) / spread).abs().max() > 40
    # Undone, it is white: what a reader of all steps has is C x + Z.
    white = torch.from_numpy(matrix(column, steps)) @ found / (sigma * column_norm(column))
    assert (white @ white.T / size - torch.eye(steps)).abs().max() < 8 / np.sqrt(size) * 1.5


def test_values_of_one_step_are_independent() -> None:
    found = run(noise_of(SystemNoise(), square_root(4).tolist()), range(3000), 8).double()
    rows_of_values = found.T[:, ::8]
    correlation = torch.corrcoef(rows_of_values) - torch.eye(8)
    assert correlation.abs().max() < 8 / np.sqrt(rows_of_values.shape[1])


def test_one_band_adds_what_independent_noise_adds() -> None:
    totals = [torch.zeros(50, dtype=torch.float64) for _ in range(3)]
    source = seeded()
    for total in totals:
        source.add_gaussian_([total], 2.0)
    found = run(noise_of(seeded(), [1.0]), range(3), 50, sigma=2.0, dtype=torch.float64)
    assert torch.equal(found, torch.stack(totals))


def test_without_noise_sums_are_divided() -> None:
    noise = noise_of(SystemNoise(), [1.0, 0.5])
    for t in range(4):
        (mean,) = step(noise, t, [torch.full((3,), 6.0)], sigma=0.0, divisor=2.0)
        assert mean.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    column = square_root(4).tolist()
    for source in (SystemNoise(), seeded()):
        noise = noise_of(source, column)
        norm = column_norm(np.array(column))
        spreads = [norm * np.sqrt((inverse(np.array(column), t + 1) ** 2).sum()) for t in range(9)]
        for t in range(9):
            turned = torch.zeros(90, 70, dtype=dtype).T
            image = torch.zeros(5, 8, 10, 10, dtype=dtype).to(memory_format=torch.channels_last)
            double = torch.zeros(4000, dtype=torch.float64)
            given = [turned, double, image]
            found = step(noise, t, list(given), in_place=t % 2 == 0)
            for total, mean in zip(given, found, strict=True):
                assert (mean is total) == (t % 2 == 0)
                assert mean.stride() == total.stride()
                assert mean.dtype is total.dtype
                deviation = mean.double().std().item() / spreads[t]
                assert abs(deviation - 1) < 8 / np.sqrt(2 * mean.numel())


BUFFERED = BufferedToeplitz(2).strategy(30, 8)


@pytest.mark.parametrize("saved_after", [0, 1, 5, 17])
def test_buffers_give_the_inverse_of_their_matrix(saved_after: int) -> None:
    """Rows of noise without bands equal those of dense matrices, also after a restart."""
    source = Recorded()
    first = CorrelatedNoise(source, BUFFERED, "buffered")
    found = (
        [run(first, range(saved_after), 20, sigma=1.5, dtype=torch.float64)] if saved_after else []
    )
    second = CorrelatedNoise(source, BUFFERED, "buffered")
    state = through_a_file(first.state_dict())
    generator = source.inner.state_dict()
    second.load_state_dict(state)
    source.inner.load_state_dict(generator)
    found.append(run(second, range(saved_after, 30), 20, sigma=1.5, dtype=torch.float64))
    drawn = torch.stack(source.drawn).numpy()
    expected = np.linalg.inv(matrix(BUFFERED.column, 30)) @ drawn
    assert np.abs(torch.cat(found).numpy() - expected).max() < 1e-9
    assert np.std(drawn) == pytest.approx(1.5 * BUFFERED.scale, rel=0.2)
    kept = state["past"].get("p0", torch.zeros(0, 20))
    assert kept.shape == ((2, 20) if saved_after else (0, 20))


def test_the_covariance_of_buffered_noise_is_that_of_the_inverse() -> None:
    found = run(CorrelatedNoise(SystemNoise(), BUFFERED, "buffered"), range(30), 20_000).double()
    white = torch.from_numpy(matrix(BUFFERED.column, 30)) @ found / BUFFERED.scale
    assert (white @ white.T / 20_000 - torch.eye(30)).abs().max() < 12 / np.sqrt(20_000)


def test_a_state_of_another_strategy_is_refused() -> None:
    buffered = CorrelatedNoise(seeded(), BUFFERED, "same name")
    run(buffered, range(3), 4)
    plain = CorrelatedNoise(seeded(), banded(square_root(3)), "same name")
    run(plain, range(3), 4)
    for one, other in ((buffered, plain), (plain, buffered)):
        with pytest.raises(
            ValueError, match=r"other coefficients\. Build the plan with the arguments of"
        ):
            one.load_state_dict(other.state_dict())


# ------------------------------------------------------------------------------- loops in C


def test_rows_ahead_are_those_of_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows follow from the same Z for widths that the loop in C splits, with and without the loop."""
    tail = square_root(7)[1:].tolist()
    for ahead, size, compiled in [(1, 1003, True), (4, 64, True), (6, 7, True), (6, 1003, False)]:
        if not compiled:
            monkeypatch.setattr(rows, "compiled_loops", lambda: None)
        source = Recorded()
        made = rows.Rows(tail, [], [torch.Size([size])], torch.zeros(0), ahead)
        found = [made.next(source, 2.0)[0].clone() for _ in range(4 * ahead)]
        expected = (
            np.linalg.inv(matrix([1.0, *tail], 4 * ahead)) @ torch.stack(source.drawn).numpy()
        )
        assert np.abs(torch.stack(found).double().numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"draws": 3}, {"compile": False}])
@pytest.mark.parametrize("many", [2**22, 1000])
def test_noise_that_is_handed_over_is_noise_added_to_zeros(
    options: dict[str, Any], many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "new_master", lambda: bytes(range(32)))
    monkeypatch.setattr(cpu, "_MANY", many)
    counts, found = [70_000, 3000, 5000], []
    SystemNoise(**options)._in_turns(
        counts, 2.0, lambda turn, values: found.append((turn, values[: counts[turn]].clone()))
    )
    assert [turn for turn, _ in found] == [0, 1, 2]
    added = [torch.zeros(count) for count in counts]
    source = SystemNoise(**options)
    # The loop in C takes one key for all turns.
    for together in [added] if not options else [[tensor] for tensor in added]:
        source.add_gaussian_(together, 2.0)
    assert all(torch.equal(values, total) for (_, values), total in zip(found, added, strict=True))


@pytest.mark.parametrize(("threads", "bands"), some(2, [1, 2], [2, 7, 20]))
def test_rows_made_in_turns_follow_from_what_was_drawn(
    threads: int, bands: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column of each turn, to rounding, also if two threads share the turns."""
    monkeypatch.setattr(cpu, "_MANY", 1000)
    before, column = torch.get_num_threads(), square_root(bands).tolist()
    steps, size, ahead = 36, 70_001, min(bands - 1, 16)
    drawn = torch.full((-(-steps // ahead) * ahead, size), torch.nan)
    real, made = SystemNoise._in_turns, 0

    def recorded(self: SystemNoise, counts: Any, sigma: float, use: Any) -> None:
        nonlocal made
        starts = np.cumsum([0, *counts]) // ahead
        fresh = drawn[made : made + ahead]

        def look(turn: int, values: Tensor) -> None:
            part = values[: counts[turn]].view(ahead, -1)
            fresh[:, starts[turn] : starts[turn + 1]] = part
            use(turn, values)

        real(self, counts, sigma, look)
        made += ahead

    monkeypatch.setattr(SystemNoise, "_in_turns", recorded)
    torch.set_num_threads(threads)
    try:
        found = run(noise_of(SystemNoise(), column), range(steps), size)
    finally:
        torch.set_num_threads(before)
    expected = np.linalg.inv(matrix(column, steps)) @ drawn[:steps].double().numpy()
    assert np.abs(found.double().numpy() - expected).max() < 1e-5
    assert len(np.unique(drawn[:steps, ::50].numpy())) > 0.99 * drawn[:steps, ::50].numel()


def test_a_loop_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = recurrence.SOURCE.read_text(encoding="utf-8")
    recurrence.prove(recurrence.compile_library(real))
    wrong = {
        "-= weight": "+= weight",
        "sum -= tail[i]": "sum -= 1.01f * tail[i]",
        "(first + k) % rows, reach": "(first + k + 1) % rows, reach",
        "fresh + k * fresh_stride": "fresh",
        "k + known < lags ? k + known : lags": "lags",
        "(target[j] + noise[j]) / divisor": "target[j] / divisor + noise[j]",
    }
    for right, other in wrong.items():
        assert right in real
        with pytest.raises(RuntimeError, match="compute different values"):
            recurrence.prove(recurrence.compile_library(real.replace(right, other)))


# ------------------------------------------------------------------------------- state


@pytest.mark.parametrize("saved_after", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("bands", [1, 2, 5])
def test_a_restored_run_goes_on_as_if_nothing_had_happened(saved_after: int, bands: int) -> None:
    column = square_root(bands).tolist()
    whole = run(noise_of(seeded(), column), range(12), 30, dtype=torch.float64)
    first = noise_of(seeded(), column)
    before = run(first, range(saved_after), 30, dtype=torch.float64) if saved_after else whole[:0]
    second = noise_of(seeded(1), column)
    second.load_state_dict(through_a_file(first.state_dict()))
    # Saved again before the first step.
    third = noise_of(seeded(2), column)
    third.load_state_dict(through_a_file(second.state_dict()))
    after = run(third, range(saved_after, 12), 30, dtype=torch.float64)
    assert torch.equal(torch.cat([before, after]), whole)


def test_noise_made_ahead_is_neither_saved_nor_used_after_a_restart() -> None:
    """Two continuations share past rows only; equal noise after the restart would reveal sums by subtraction."""
    column, size = square_root(6).tolist(), 5000
    first = noise_of(SystemNoise(), column)
    past = run(first, range(7), size)  # in the middle of what was made ahead
    saved = through_a_file(first.state_dict())
    assert torch.equal(saved["past"]["p0"], past[-5:])
    ways = []
    for _ in range(2):
        again = noise_of(SystemNoise(), column)
        again.load_state_dict(saved)
        ways.append(run(again, range(7, 10), size))
    ways.append(run(first, range(7, 10), size))
    fresh = []
    for way in ways:
        joined = torch.cat([past, way]).double().numpy()
        z = matrix(column, 10) @ joined / column_norm(np.array(column))
        fresh.append(z[7:])
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        correlation = (fresh[one] * fresh[other]).mean(1)
        assert np.abs(correlation).max() < 8 / np.sqrt(size)
    assert all(abs(z.std() - 1) < 8 / np.sqrt(2 * z.size) for z in fresh)


def test_a_state_that_is_held_does_not_change_with_the_run() -> None:
    noise = noise_of(SystemNoise(), square_root(3).tolist())
    run(noise, range(5), 10)
    held = noise.state_dict()
    before = copy.deepcopy(held)
    run(noise, range(5, 15), 10)
    assert torch.equal(held["past"]["p0"], before["past"]["p0"])


def test_the_coefficients_of_the_saved_noise_are_continued() -> None:
    first = noise_of(seeded(), [1.0, 0.5])
    run(first, range(2), 4, dtype=torch.float64)
    second = noise_of(seeded(), [1.0, 0.5 + 1e-9])
    second.load_state_dict(through_a_file(first.state_dict()))
    assert torch.equal(
        run(first, range(2, 4), 4, dtype=torch.float64),
        run(second, range(2, 4), 4, dtype=torch.float64),
    )


LOST = "the noise of the earlier steps is not known here"


def begun(source: NoiseSource | None = None, steps: int = 3) -> CorrelatedNoise:
    noise = noise_of(source or SystemNoise(), square_root(3).tolist())
    run(noise, range(steps), 4)
    return noise


@pytest.mark.parametrize("number", [0, 1, 2, 4, 100])
def test_only_the_next_step_may_follow(number: int) -> None:
    noise = begun()
    with pytest.raises(PrivacyBudgetError, match=LOST):
        run(noise, range(number, number + 1), 4)
    run(noise, range(3, 4), 4)  # nothing was changed


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_does_not_share_the_noise(copied: Any) -> None:
    other = copied(begun())
    with pytest.raises(PrivacyBudgetError, match=LOST):
        run(other, range(3, 4), 4)
    run(other, range(2), 4)  # it may begin a run of its own


def test_a_fork_cannot_go_on() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    noise = begun(seeded())

    def child(pipe: Any) -> None:
        try:
            run(noise, range(3, 4), 4)
            pipe.send("went on")
        except PrivacyBudgetError as error:
            pipe.send(str(error))

    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    worker.start()
    assert ours.poll(60)
    assert LOST in ours.recv()
    worker.join(60)


def test_after_a_step_that_failed_nothing_goes_on() -> None:
    class Failing(Recorded):
        def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
            if len(self.drawn) == 2:
                raise MemoryError
            super().add_gaussian_(tensors, sigma)

    noise = noise_of(Failing(), [1.0, 0.5])
    run(noise, range(2), 4)
    with pytest.raises(MemoryError):
        run(noise, range(2, 3), 4)
    with pytest.raises(PrivacyBudgetError, match=LOST):
        run(noise, range(2, 3), 4)
    with pytest.raises(PrivacyBudgetError, match="cannot be continued"):
        noise.state_dict()


def test_parameters_and_sigma_stay_what_they_were() -> None:
    noise = begun()
    with pytest.raises(ValueError, match=r"trained parameters are p0 \(5,\), but were p0 \(4,\)"):
        run(noise, range(3, 4), 5)
    with pytest.raises(ValueError, match=r"are other \(4,\), but were p0"):
        run(noise, range(3, 4), 4, names=["other"])
    with pytest.raises(ValueError, match=r"sigma is 2\.0 at step 3 and was 1\.0 before"):
        run(noise, range(3, 4), 4, sigma=2.0)
    run(noise, range(3, 4), 4)


def test_parameters_may_move_to_another_dtype() -> None:
    """Past rows belong to parameter names, so they are converted to the new dtype."""
    column = [1.0, 0.5]
    source = Recorded()
    noise = noise_of(source, column)
    first = run(noise, range(1), 6)
    second = run(noise, range(1, 2), 6, dtype=torch.float64)
    wanted = source.drawn[1] - 0.5 * first[0].double()
    assert (second[0] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "SystemNoise"}, "must come from CorrelatedNoise"),
        (
            {"accounting": "4-banded"},
            "the saved state belongs to 4-banded noise, but this plan's noise is 3-banded",
        ),
        ({"past": {}}, "must hold 2 tensors of past noise for each of 1 parameters"),
        ({"past": {"p0": torch.zeros(1, 4)}}, "must hold 2 tensors of past noise"),
        ({"step": 1}, "is of step 1 and must hold 1 tensors of past noise"),
        ({"shapes": [[5]]}, "must hold 2 tensors of past noise"),
    ],
)
def test_states_that_do_not_fit_change_nothing(change: dict[str, Any], message: str) -> None:
    noise = begun()
    with pytest.raises(ValueError, match=message):
        noise.load_state_dict({**begun().state_dict(), **change})
    run(noise, range(3, 4), 4)


def test_counts_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match="does not allow adaptive clipping norms, whose noisy counts have no proven",
    ):
        begun().count([torch.zeros(())], 1.0)


def test_another_source_takes_over_from_the_next_step() -> None:
    column = square_root(5).tolist()
    noise = noise_of(SystemNoise(), column)
    past = run(noise, range(6), 40)
    source = Recorded()
    noise.change_source(source)
    found = run(noise, range(6, 9), 40)
    joined = torch.cat([past, found]).double().numpy()
    z = matrix(column, 9) @ joined
    assert np.abs(z[6:] - torch.stack(source.drawn).numpy()).max() < 1e-5
