"""The loop in C computes the Gaussians of the formula, proves it, and gives way where it cannot."""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipgrad.noise import SystemNoise, c_loop, cpu, keys
from clipgrad.noise.c_loop import (
    CAPACITY,
    LoopedBoxMuller,
    compile_loop,
    make_looped,
    verify,
)
from tests.noise_checks import check_gaussian, check_independent
from tests.test_noise_gaussian import Given, edge_words, oracle

EPS = 2.0**-23
SOURCE = c_loop.SOURCE.read_text(encoding="utf-8")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(c_loop, "_found", [])


# -------------------------------------------------------------------------------------- values


def loop() -> LoopedBoxMuller:
    found = make_looped(may_compile=True)
    if found is None:
        pytest.skip("no C compiler here")
    return found


def drawn(radius_words: list[int], angle_words: list[int]) -> Tensor:
    """``[2, pairs]``: the values of the words, sines and cosines."""
    found, most, parts = loop(), CAPACITY // 2, []
    for start in range(0, len(radius_words), most):
        rows = slice(start, start + most)
        given = Given(radius_words[rows], angle_words[rows], torch.float32)
        size = 2 * len(radius_words[rows])
        parts.append(found.draw(given, size).view(2, -1).double())
    return torch.cat(parts, 1)


def test_there_is_a_compiler_where_tests_run() -> None:
    """Else all of this is skipped, and nobody sees it."""
    assert make_looped(may_compile=True) is not None


def words(values: np.ndarray[Any, np.dtype[np.float64]], bits: int) -> list[int]:
    top = 2 ** (bits - 1)
    return [min(top - 1, max(-top, int(value))) for value in values]


def test_the_sine_has_the_precision_of_its_dtype() -> None:
    """At one radius, over all angles and closely around those where it vanishes."""
    turns = np.concatenate(
        [np.linspace(-1, 1, 20_001), np.logspace(-9, 0, 3_001), -np.logspace(-9, 0, 3_001)]
    )
    near_the_other_axis = [s * (2**31 - 2**p) - (s < 0) for s in (1, -1) for p in range(31)]
    angle_words = words(turns * 2**31, 32) + near_the_other_axis
    found = drawn([-(2**62)] * len(angle_words), angle_words)
    exact = torch.tensor([oracle(-(2**62), k, 32) for k in angle_words], dtype=torch.float64).T
    assert ((found - exact).abs() <= 5 * EPS * exact.abs()).all()


def test_the_logarithm_has_the_precision_of_its_dtype() -> None:
    """At every power of two, on both sides of where the range is cut, and towards 1."""
    cuts = 2.0 ** np.arange(-52, 0)
    around = 1 + np.linspace(-1e-6, 1e-6, 201)
    u = np.concatenate(
        [
            np.linspace(2.0**-53, 1, 10_001),
            (cuts[:, None] * around).ravel(),
            (cuts[:, None] * around).ravel() * 0.5**0.5,
            1 - np.logspace(-53, -1, 2_001, base=2),
        ]
    )
    # u is a float64 by definition: these words are multiples of its last place.
    radius_words = words(np.rint((u - 0.5) * 2.0**53) * 2.0**11, 64)
    angle_word = 2**30
    found = drawn(radius_words, [angle_word] * len(radius_words))
    exact = torch.tensor([oracle(j, angle_word, 32) for j in radius_words], dtype=torch.float64).T
    assert ((found - exact).abs() <= 5 * EPS * exact.abs()).all()


def test_values_are_those_of_the_formula() -> None:
    """Random words, and every pair of words at an edge: 0, the ends, a quarter turn."""
    random, pairs = np.random.default_rng(1), CAPACITY // 2
    edges = [(j, k) for j in edge_words(64) for k in edge_words(32)]
    radius_words = [int(w) for w in random.integers(-(2**63), 2**63 - 1, pairs)]
    angle_words = [int(w) for w in random.integers(-(2**31), 2**31 - 1, pairs)]
    radius_words[: len(edges)], angle_words[: len(edges)] = map(list, zip(*edges, strict=True))
    found = drawn(radius_words, angle_words)
    expected = [oracle(j, k, 32) for j, k in zip(radius_words, angle_words, strict=True)]
    exact = torch.tensor(expected, dtype=torch.float64).T
    assert ((found - exact).abs() <= 8 * EPS * exact.abs()).all()
    assert float(found.abs().max()) > 8.5


@pytest.mark.parametrize(
    "size", [1, 2, 31, 2048, 2049, CAPACITY - 1, CAPACITY + 1, 3 * CAPACITY + 20_000]
)
def test_any_number_of_values(size: int) -> None:
    """Each gets noise of its own, and the next call other noise; nothing beside them is touched."""
    source, totals = SystemNoise(), torch.zeros(2, size + 2)
    for total in totals:
        source.add_gaussian_([total[1 : size + 1]], 3.0)
    assert (totals[:, [0, size + 1]] == 0).all()
    values = totals[:, 1 : size + 1]
    assert (values != 0).all()
    assert len(values.unique()) > 0.98 * values.numel()
    if size > 1000:
        check_gaussian(values, 3.0)
        check_independent(torch.cat([values, values.flip(1)[:1]]).double())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_a_large_tensor(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MANY", 4 * CAPACITY)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    source, size = SystemNoise(), 12 * CAPACITY + 77
    totals = torch.zeros(4, size)
    for total in totals:
        source.add_gaussian_([total, torch.zeros(100)], 2.0)
    assert (totals != 0).all()
    check_gaussian(totals, 2.0)
    check_independent(totals.double())
    check_independent(totals[:, : 12 * CAPACITY].reshape(48, CAPACITY).double())


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_share_many_tensors(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them large; shares are cut wherever they end."""
    monkeypatch.setattr(cpu, "_MANY", 4 * CAPACITY)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    submitted: list[int] = []
    real = ThreadPoolExecutor.submit

    def submit(self: ThreadPoolExecutor, add: Any, *args: Any) -> Any:
        submitted.append(sum(flat.numel() for flat in args[2]))
        return real(self, add, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    source, sizes = SystemNoise(), [CAPACITY + 5, 2500, 1, CAPACITY, 60_001, 3000, 100, 77_777]
    totals = [torch.zeros(2, 1 + size) for size in sizes]
    for call in range(2):
        source.add_gaussian_([total[call, 1:] for total in totals], 2.0)
    assert all((total[:, 0] == 0).all() for total in totals)  # nothing before a tensor is touched
    values = torch.cat([total[:, 1:] for total in totals], 1)
    assert (values != 0).all()
    assert len(values.unique()) > 0.98 * values.numel()
    check_gaussian(values, 2.0)
    check_independent(values.double())
    large = sum(size for size in sizes if size > 2048)
    each = -(-large // threads)
    assert submitted == 2 * ([each] * (threads - 2) + [large - each * (threads - 1)])


def test_few_values_stay_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    loop()
    monkeypatch.setattr(cpu, "_MANY", 4 * CAPACITY)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", None)
    total = torch.zeros(2, 2 * CAPACITY - 1)
    SystemNoise().add_gaussian_([*total.unbind(), torch.zeros(1500)], 1.0)
    assert (total != 0).all()


def test_a_thread_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    loop()
    monkeypatch.setattr(cpu, "_MANY", 4 * CAPACITY)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    real, main = LoopedBoxMuller.add, threading.get_ident()

    def add(self: LoopedBoxMuller, *args: Any) -> None:
        if threading.get_ident() != main:
            raise MemoryError("in a thread")
        real(self, *args)

    monkeypatch.setattr(LoopedBoxMuller, "add", add)
    with pytest.raises(MemoryError, match="in a thread"):
        SystemNoise().add_gaussian_([torch.zeros(5 * CAPACITY)], 1.0)


def test_it_adds_to_what_is_there() -> None:
    start = torch.randn(100_000)
    total = start.clone()
    version = total._version
    loop_source = SystemNoise()
    loop_source.add_gaussian_([total], 2.0)
    check_gaussian(total - start, 2.0)
    assert total._version > version  # else autograd would not see that somebody wrote


@pytest.mark.usefixtures("two_threads")
def test_tensors_of_every_kind() -> None:
    source = SystemNoise(draws=2)
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
        SystemNoise().add_gaussian_([total], 1.0)
    SystemNoise().add_gaussian_([total], 1.0)
    check_gaussian(total, 2**0.5)
    assert c_loop._found != [None]


# --------------------------------------------------------------------------------------- proof


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param(" sines[i] = keep ? (", " sines[i] = keep ? (4e-6f + ", id="too large"),
        pytest.param("cosines[i] = keep ? (", "cosines[i] = keep ? (1e-12f + ", id="coarse near 0"),
        pytest.param(
            "+ value) / divisor : value;\n        }\n    }",
            "+ value) / divisor : value + 1e-12f;\n        }\n    }",
            id="coarse near 0 where values are replaced",
        ),
        pytest.param(
            "from_integer(j[i])", "from_integer(j[i] >> 40 << 40)", id="uniforms of float32"
        ),
        pytest.param(
            "0x1p-64 + (0.5 + 0x1p-53)", "0x1p-64 + (0.5 + 0x1p-40)", id="the tail is cut"
        ),
        pytest.param("(float)k[i]", "(float)(k[i] | 63)", id="the axis is cut"),
        pytest.param(": cosine_count;", ": cosine_count - 1;", id="one is missing"),
        pytest.param("first < pairs", "first < pairs / 2", id="half is left out"),
        pytest.param("<< 31) >> 31) ^ k[i] ^", "<< 31) >> 31) * 0 ^ k[i] ^", id="without a sign"),
        pytest.param("0x1p84 + 0x1p63 + 0x1p52", "0x1p84 + 0x1p52", id="unsigned"),
        pytest.param("= (size + 1) / 2", "= size / 2", id="an odd one is left out"),
        pytest.param("(sines[i] + ", "(", id="not added"),
        pytest.param("(sines[i] + value) / divisor", "(sines[i] + value)", id="not divided"),
        pytest.param(
            "(cosines[i] + value) / divisor",
            "(cosines[i] + value) / scale",
            id="divided by another",
        ),
        pytest.param("divisor == 0.0f", "divisor == 4.0f", id="not replaced"),
        pytest.param("scale * sqrtf", "sqrtf", id="not scaled"),
    ],
)
def test_a_wrong_loop_does_not_pass(right: str, wrong: str) -> None:
    assert SOURCE.count(right) == 1, right
    loop()  # skips without a compiler
    with pytest.raises(RuntimeError, match="is right"):
        verify(LoopedBoxMuller(compile_loop(SOURCE.replace(right, wrong))))


def test_no_compiler_takes_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="error"):
        compile_loop("nonsense")
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(RuntimeError, match="there is no C compiler"):
        compile_loop(SOURCE)


def test_a_compiler_that_does_not_know_this_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loop()
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\ncase "$*" in *-march=native*) exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    verify(LoopedBoxMuller(compile_loop(SOURCE)))


def fails(_: str) -> c_loop.Loop:
    raise OSError("no compiler\nhere")


def adds_nothing(_: str) -> c_loop.Loop:
    return lambda *_: None


@pytest.mark.parametrize("made", [fails, adds_nothing])
@pytest.mark.usefixtures("unproved")
def test_without_a_right_loop_noise_is_made_uncompiled_and_told_of_once(
    made: Callable[[str], c_loop.Loop],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(c_loop, "compile_loop", made)
    monkeypatch.setattr(keys, "new_master", lambda: bytes(32))
    caplog.set_level(logging.INFO, "clipgrad")
    totals = torch.zeros(3, 200_000)
    for total, compile_it in zip(totals, (True, True, False), strict=True):
        SystemNoise(compile=compile_it).add_gaussian_([total], 1.0)
    assert torch.equal(totals[0], totals[2])
    assert torch.equal(totals[1], totals[2])
    check_gaussian(totals[0], 1.0)
    (told,) = caplog.records
    assert (told.name, told.levelno) == ("clipgrad", logging.INFO)
    assert "without a C compiler" in told.getMessage()
    assert "\n" not in told.getMessage()


def test_compiled_and_uncompiled_make_the_same_of_the_same_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop()
    monkeypatch.setattr(keys, "new_master", lambda: bytes(32))
    size = min(CAPACITY, cpu.PIECE)
    totals = torch.zeros(2, size)
    for total, compile_it in zip(totals, (True, False), strict=True):
        SystemNoise(compile=compile_it).add_gaussian_([total], 1.0)
    assert not torch.equal(totals[0], totals[1])
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("unproved")
def test_a_loop_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def count(source: str) -> c_loop.Loop:
        made.append(source)
        return compile_loop(source)

    monkeypatch.setattr(c_loop, "compile_loop", count)
    for _ in range(2):
        source = SystemNoise()
        for size in (2048, 10_000, CAPACITY + 5, 100_000, 400_000, 17):
            source.add_gaussian_([torch.zeros(size)], 1.0)
    assert len(made) == 1


# -------------------------------------------------------------------------------- where it is used


def refused(*, may_compile: bool) -> LoopedBoxMuller:
    raise AssertionError("the loop was asked for")


def test_only_float32_and_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "make_looped", refused)
    large = [torch.zeros(200_000)]
    SystemNoise(compile=False).add_gaussian_(large, 1.0)
    SystemNoise().add_gaussian_([large[0].double()], 1.0)
    with pytest.raises(AssertionError, match="asked for"):
        SystemNoise().add_gaussian_(large, 1.0)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_compile_is_a_truth_value(value: object) -> None:
    with pytest.raises(TypeError, match="compile must be True or False"):
        SystemNoise(compile=value)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("warm", [True, False])
def test_a_forked_child_draws_alone(warm: bool) -> None:
    """The loop needs no threads, so a child may use its parent's. It proves none: that takes torch's threads."""
    source = SystemNoise()
    torch.ones(400_000).sin_()  # now the parent has threads
    if warm:
        source.add_gaussian_([torch.zeros(200_000)], 1.0)
    memory = np.frombuffer(mmap.mmap(-1, 4 * 200_000), dtype=np.float32)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if not warm:
                c_loop._found.clear()
                source = SystemNoise()
            source.add_gaussian_([torch.from_numpy(memory)], 1.0)
            code = 0 if 0.9 < memory.std() < 1.1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert 0.9 < memory.std() < 1.1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_compiles() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 4 * 20_000), dtype=np.float32)
    with c_loop._compiling:
        pid = os.fork()
        if pid == 0:
            try:
                SystemNoise().add_gaussian_([torch.from_numpy(memory)], 1.0)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    assert 0.9 < memory.std() < 1.1
