"""A refused loss ends in a traceback of the user's lines alone, the last of which is at fault."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipgrad
from clipgrad.errors import NotPerSampleError
from tests.dp_tools import data, mlp, private
from tests.mistakes import MISTAKES

PACKAGE = str(Path(clipgrad.__file__).parent)
REFUSED = (
    "a boolean index",
    "an in-place write to a parameter",
    "a dictionary as loss",
    "`.item()` in the loss",
)


def lines(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def at_fault(m: Any, x: Tensor) -> Tensor:
    inner = torch.nn.functional.relu(m(x))
    return inner[inner > 0].sum()  # the line that the traceback has to end in


@pytest.mark.parametrize("what", REFUSED)
def test_no_line_is_of_clipgrad_or_pytorch(what: str) -> None:
    with pytest.raises(NotPerSampleError) as caught:
        MISTAKES[what]()
    files = [line.filename for line in lines(caught.value)]
    assert files
    assert not [file for file in files if file.startswith(PACKAGE) or "/torch/" in file]
    printed = "".join(traceback.format_exception(caught.value))
    assert "another exception" not in printed
    assert "direct cause" not in printed


def test_the_last_line_is_at_fault() -> None:
    optimizer = private(mlp(), at_fault)
    gradient = clipgrad.clipped_grad(
        lambda p, x: at_fault(lambda x: x * p["w"], x), max_grad_norm=1.0
    )
    for call in (
        lambda: optimizer.backward(data()),
        lambda: gradient({"w": torch.ones(4).double()}, data()),
    ):
        with pytest.raises(NotPerSampleError) as caught:
            call()
        assert lines(caught.value)[-1].name == "at_fault"
        assert (
            lines(caught.value)[-1].line
            == "return inner[inner > 0].sum()  # the line that the traceback has to end in"
        )
        assert isinstance(caught.value.__context__, RuntimeError)  # PyTorch's own, for a debugger


def test_everything_is_shown_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPGRAD_FULL_TRACEBACK", "1")
    with pytest.raises(NotPerSampleError) as caught:
        private(mlp(), at_fault).backward(data())
    assert [line for line in lines(caught.value) if line.filename.startswith(PACKAGE)]
    assert caught.value.__cause__ is not None
