"""The compiled loop computes the Gaussians of the formula, proves it, and gives way where it cannot."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from clipgrad import DPOptimizer
from clipgrad.noise import SystemNoise, _cpu, _float32_loop, _fused, _keys
from clipgrad.noise._cpu import FEW, SHARED_PIECE, SMALL_PIECE
from clipgrad.noise._fused import FusedBoxMuller, fused, prove
from tests.noise_checks import check_gaussian, check_independent
from tests.test_noise_gaussian import Given, edge_words, oracle

EPS = 2.0**-23


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(_fused, "_proved", {})
    monkeypatch.setattr(_fused, "_told", False)


def of_the_loop(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    _float32_loop.gaussians(j, k, sines, cosines)


# -------------------------------------------------------------------------------------- values


def relative(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact) / exact).abs().max())


def test_the_sine_has_the_precision_of_its_dtype() -> None:
    angles = torch.cat([torch.linspace(1e-9, np.pi / 2, 2_000_001), torch.logspace(-30, 0, 10_001)])
    angles = angles.clamp(max=float(np.float32(np.pi / 2)))
    for sign in (1, -1):
        assert relative(_float32_loop.sine(sign * angles), (sign * angles).double().sin()) < 2 * EPS


def test_the_logarithm_has_the_precision_of_its_dtype() -> None:
    """At every power of two, on both sides of where the range is cut, and towards 1."""
    f64 = torch.float64
    cuts = 2.0 ** torch.arange(-52, 1, dtype=f64) * 0.5**0.5
    around = 1 + torch.linspace(-1e-6, 1e-6, 2001, dtype=f64)
    u = torch.cat(
        [
            torch.linspace(2.0**-53, 1 - 1e-9, 2_000_001, dtype=f64),
            torch.logspace(-53, -1e-9, 200_001, base=2, dtype=f64),
            (2.0 ** torch.arange(-52, 0, dtype=f64)[:, None] * around).flatten(),
            (cuts[:, None] * around).flatten(),
            1 - torch.logspace(-53, -1, 20_001, base=2, dtype=f64),
        ]
    )
    u = u[(u >= 2.0**-53) & (u < 1)]
    assert relative(_float32_loop.log(u), u.log()) < 3 * EPS
    assert float(_float32_loop.log(torch.ones(1, dtype=f64))) == 0.0


@pytest.mark.parametrize("capacity", [SMALL_PIECE, SHARED_PIECE])
@pytest.mark.usefixtures("two_threads")
def test_values_are_those_of_the_formula(capacity: int) -> None:
    """Random words, and every pair of words at an edge: 0, the ends, a quarter turn."""
    random, pairs = np.random.default_rng(1), capacity // 2
    edges = [(j, k) for j in edge_words(64) for k in edge_words(32)]
    radius_words = [int(w) for w in random.integers(-(2**63), 2**63 - 1, pairs)]
    angle_words = [int(w) for w in random.integers(-(2**31), 2**31 - 1, pairs)]
    radius_words[: len(edges)], angle_words[: len(edges)] = map(list, zip(*edges, strict=True))
    gaussians = fused(capacity, parallel=capacity == SHARED_PIECE)
    assert gaussians is not None
    given = Given(radius_words, angle_words, torch.float32)
    found = gaussians.draw(given, capacity).view(2, pairs).double()
    expected = [oracle(j, k, 32) for j, k in zip(radius_words, angle_words, strict=True)]
    exact = torch.tensor(expected, dtype=torch.float64).T
    assert ((found - exact).abs() <= 8 * EPS * exact.abs()).all()
    assert float(found.abs().max()) > 8.5


@pytest.mark.parametrize(
    "size",
    [1, 31, 2048, SMALL_PIECE, FEW * SMALL_PIECE + 1, SHARED_PIECE, 3 * SHARED_PIECE + 20_000],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_values(size: int, threads: int) -> None:
    """Each gets noise of its own, and the next call other noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source, totals = SystemNoise(compile=True), torch.zeros(2, size + 1)
    try:
        for total in totals:
            source.add_gaussian_([total[:size]], 3.0)
    finally:
        torch.set_num_threads(before)
    assert (totals[:, size] == 0).all()
    values = totals[:, :size]
    assert (values != 0).all()
    assert len(values.unique()) > 0.98 * values.numel()
    if size > 1000:
        check_gaussian(values, 3.0)
        check_independent(torch.cat([values, values.flip(1)[:1]]).double())


@pytest.mark.usefixtures("two_threads")
def test_tensors_of_every_kind() -> None:
    source = SystemNoise(compile=True, draws=2)
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    gaps = torch.zeros(400, 600)[:, ::2]
    half, double = torch.zeros(60_000, dtype=torch.bfloat16), torch.zeros(60_000).double()
    small = [torch.zeros(n) for n in (1, 0, 700, 9_000, 32)]
    source.add_gaussian_([parameter, gaps, half, double, *small], 2.0)
    for total in (parameter.detach(), gaps, half, double, torch.cat(small)):
        check_gaussian(total, 2.0)
    with torch.inference_mode():
        inside = torch.zeros(200_000)
        source.add_gaussian_([inside, parameter], 2.0)
        check_gaussian(inside, 2.0)
    source.add_gaussian_([parameter], 2.0)
    check_gaussian(parameter.detach(), 2.0 * 3**0.5)


@pytest.mark.usefixtures("unproved")
def test_compiled_under_inference_mode() -> None:
    total = torch.zeros(10_000)
    with torch.inference_mode():
        SystemNoise(compile=True).add_gaussian_([total], 1.0)
    SystemNoise(compile=True).add_gaussian_([total], 1.0)
    check_gaussian(total, 2**0.5)
    assert _fused._proved[SMALL_PIECE, False] is not None


# --------------------------------------------------------------------------------------- proof

Change = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def too_large(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    of_the_loop(j, k, sines, cosines)
    sines *= 1 + 4e-6


def coarse_near_zero(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    of_the_loop(j, k, sines, cosines)
    cosines += 1e-12


def of_float32_uniforms(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    of_the_loop((j >> 40) << 40, k, sines, cosines)


def tail_is_cut(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    of_the_loop(j.clamp(min=-(2**63) + 2**40), k, sines, cosines)


def axis_is_cut(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    of_the_loop(j, k.clamp(max=2**31 - 2**6), sines, cosines)


def one_lane_is_nan(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    of_the_loop(j, k, sines, cosines)
    cosines[-1] = torch.nan


def half_is_left_out(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    half = len(j) // 2
    of_the_loop(j[:half], k[:half], sines[:half], cosines[:half])


def without_a_sign(j: Tensor, k: Tensor, sines: Tensor, cosines: Tensor) -> None:
    of_the_loop(j, k, sines, cosines)
    cosines.abs_()


@pytest.mark.parametrize(
    "wrong",
    [
        too_large,
        coarse_near_zero,
        of_float32_uniforms,
        tail_is_cut,
        axis_is_cut,
        one_lane_is_nan,
        half_is_left_out,
        without_a_sign,
        lambda *_: None,
    ],
)
def test_a_wrong_loop_does_not_pass(wrong: Change) -> None:
    with pytest.raises(RuntimeError, match="is right"):
        prove(FusedBoxMuller(SMALL_PIECE, wrong))


def test_the_right_one_passes_uncompiled() -> None:
    prove(FusedBoxMuller(SMALL_PIECE, of_the_loop))


def fails(*_: object) -> _fused.Loop:
    raise OSError("no compiler\nhere")


@pytest.mark.parametrize("compiled", [fails, lambda *_: too_large])
@pytest.mark.usefixtures("unproved")
def test_without_a_right_loop_noise_is_made_uncompiled_and_told_of_once(
    compiled: Callable[..., _fused.Loop],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_fused, "compiled", compiled)
    monkeypatch.setattr(_keys, "new_master", lambda: bytes(32))
    totals = torch.zeros(3, 200_000)
    for total, compile_it in zip(totals, (True, True, False), strict=True):
        SystemNoise(compile=compile_it).add_gaussian_([total], 1.0)
    assert torch.equal(totals[0], totals[2])
    assert torch.equal(totals[1], totals[2])
    check_gaussian(totals[0], 1.0)
    (told,) = caplog.records
    assert (told.name, told.levelno) == ("clipgrad", logging.WARNING)
    assert "uncompiled" in told.getMessage()
    assert "\n" not in told.getMessage()


@pytest.mark.usefixtures("unproved")
def test_a_compiled_loop_that_is_right_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(_fused, "compiled", lambda *at: made.append(at) or of_the_loop)
    for _ in range(2):
        source = SystemNoise(compile=True)
        for size in (2048, 10_000, SMALL_PIECE + 5, 100_000, 400_000, 17):
            source.add_gaussian_([torch.zeros(size)], 1.0)
    assert len(made) == 2


# -------------------------------------------------------------------------------- where it is used


def refused(*_: object, **__: object) -> FusedBoxMuller:
    raise AssertionError("the compiled loop was asked for")


def test_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "fused", refused)
    large = [torch.zeros(200_000)]
    SystemNoise().add_gaussian_(large, 1.0)
    SystemNoise(compile=True).add_gaussian_([large[0].double()], 1.0)
    with pytest.raises(AssertionError, match="asked for"):
        SystemNoise(compile=True).add_gaussian_(large, 1.0)


@pytest.mark.parametrize("compiled", [False, True, "default"])
def test_an_optimizer_compiles_noise_if_it_compiles_the_step(
    compiled: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu, "fused", refused)
    model = torch.nn.Linear(2, 1)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda model, x: model(x).sum(),
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=4,
        compile=compiled,
    )
    asked = False
    try:
        optimizer.noise.add_gaussian_([torch.zeros(10_000)], 1.0)
    except AssertionError:
        asked = True
    assert asked == bool(compiled)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_compile_is_a_truth_value(value: object) -> None:
    with pytest.raises(TypeError, match="compile must be True or False"):
        SystemNoise(compile=value)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_draws_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the parent's loop nor a new one: OpenMP's threads would never answer."""
    source = SystemNoise(compile=True)
    source.add_gaussian_([torch.zeros(200_000)], 1.0)
    memory = np.zeros(200_000, dtype=np.float32)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            monkeypatch.setattr(_cpu, "fused", refused)
            source.add_gaussian_([torch.from_numpy(memory)], 1.0)
            code = 0 if 0.9 < memory.std() < 1.1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
