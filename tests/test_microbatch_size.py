"""``microbatch_size='auto'``, and what an error says where memory runs out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgrad.batch
from clipgrad import clipped_grad
from clipgrad.engine.microbatch_size import GrowingRows
from tests.dp_tools import clipped, data, mlp, private, squared


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the microbatches that run."""
    seen: list[int] = []
    run = clipgrad.batch.run

    def recorded(loss: Any, names: Any, params: Any, batch: Any, *rest: Any) -> Any:
        seen.append(batch[0].shape[0])
        return run(loss, names, params, batch, *rest)

    monkeypatch.setattr(clipgrad.batch, "run", recorded)
    return seen


def assert_exact(optimizer: Any, model: nn.Module, x: Tensor) -> None:
    sums, _ = clipped(model, x)
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)


def test_it_doubles_while_memory_lasts_and_tells(
    sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = mlp(), data(23)
    optimizer = private(model, microbatch_size="auto")
    with caplog.at_level(logging.INFO, "clipgrad"):
        optimizer.backward(x)
        assert_exact(optimizer, model, x)
        optimizer.zero_grad()
        optimizer.backward(x)
    assert sizes == [1, 2, 4, 8, 8, 16, 7]
    assert_exact(optimizer, model, x)
    assert "microbatch_size='auto': up to 16 samples at a time." in caplog.messages
    optimizer.zero_grad()
    optimizer.backward(x[:0])
    optimizer.backward(x)
    assert_exact(optimizer, model, x)


@pytest.mark.parametrize(("budget", "expected"), [(1, 1), (3, 2), (9, 8), (15, 8), (16, 16)])
def test_the_next_number_has_to_fit_the_budget(budget: float, expected: int) -> None:
    """One byte a sample: n samples ran, and 2 n fit if they are within the budget."""
    peak = 100.0
    rows = GrowingRows(budget, lambda: peak)
    for _ in range(4):
        peak = max(peak, 100.0 + rows.rows)
        rows.ran(rows.rows)
    assert rows.rows == expected
    rows.ran(1)
    assert rows.rows == expected


class OutOfMemory:
    """Runs out of memory above some number of samples, as a GPU does."""

    def __init__(self, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fits, self.run = fits, clipgrad.batch.run
        monkeypatch.setattr(clipgrad.batch, "run", self)

    def __call__(self, loss: Any, names: Any, params: Any, batch: Any, *rest: Any) -> Any:
        if batch[0].shape[0] > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.run(loss, names, params, batch, *rest)


@pytest.mark.parametrize("fits", [1, 3, 7])
def test_it_halves_where_memory_runs_out(
    fits: int, monkeypatch: pytest.MonkeyPatch, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    OutOfMemory(fits, monkeypatch)
    model, x = mlp(), data(23)
    optimizer = private(model, microbatch_size="auto")
    with caplog.at_level(logging.INFO, "clipgrad"):
        optimizer.backward(x)
    assert_exact(optimizer, model, x)
    assert max(sizes) == {1: 1, 3: 2, 7: 4}[fits]
    assert sum(sizes) == 23
    assert f"microbatch_size='auto': {max(sizes)} samples at a time." in caplog.messages


def test_out_of_memory_names_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    OutOfMemory(3, monkeypatch)
    for rows in (None, 4):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            private(mlp(), microbatch_size=rows).backward(data(9))
        (note,) = caught.value.__notes__
        assert (
            f"{rows or 9} samples at a time. Set microbatch_size to {(rows or 9) // 2} or less"
            in note
        )
        assert "microbatch_size='auto'" in note
    monkeypatch.undo()
    OutOfMemory(0, monkeypatch)
    for auto in (1, "auto"):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            private(mlp(), microbatch_size=auto).backward(data(9))
        assert (
            r"one sample at a time. Set Performance(strategy='ghost')" in caught.value.__notes__[0]
        )


def test_the_cpus_own_error_gets_the_note_and_others_do_not() -> None:
    def hungry(model: nn.Module, x: Tensor) -> Tensor:
        return squared(model, x) + x.new_zeros(2**50).sum()

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        private(mlp(), hungry).backward(data(4))
    assert "Set microbatch_size to 2 or less" in caught.value.__notes__[-1]

    def broken(model: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("of the loss's own")

    with pytest.raises(RuntimeError, match="of the loss's own") as caught:
        private(mlp(), broken, microbatch_size="auto").backward(data(4))
    assert not hasattr(caught.value, "__notes__")


def test_what_it_excludes() -> None:
    with pytest.raises(ValueError, match=r"microbatch_size='auto' cannot be combined with compile"):
        private(mlp(), microbatch_size="auto", compile=True)
    for wrong in ("all", 0, 2.0, True):
        with pytest.raises(ValueError, match=r"a positive integer, or None .*, or 'auto'"):
            private(mlp(), microbatch_size=wrong)
    x = data(5)
    gradient = clipped_grad(
        lambda p, x: (x @ p["w"]).square().sum(), max_grad_norm=1.0, microbatch_size="auto"
    )
    params = {"w": torch.ones(4, 2, dtype=torch.float64)}
    assert gradient(params, x).grad_norms.shape == (5,)
    assert gradient.explain(params, x).microbatch_size == 5
