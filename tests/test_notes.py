"""Errors of the loss's own pass as they are, with a note where what it has to know here may be the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import clipped_grad
from clipgrad.errors import NotPerSampleError
from tests.dp_tools import data, mlp, private

Loss = Callable[[Any, Tensor], Any]
SIZES: dict[str, tuple[Loss, type[Exception]]] = {
    "view": (lambda m, x: m(x).view(5, 2).sum(), RuntimeError),
    "index": (lambda m, x: m(x)[3].sum(), IndexError),
    "targets": (lambda m, x: F.cross_entropy(m(x), torch.zeros(5).long()), ValueError),
}


@pytest.mark.parametrize("name", SIZES)
def test_an_error_about_sizes_tells_that_there_is_one_sample(name: str) -> None:
    loss, kind = SIZES[name]
    with pytest.raises(kind) as caught:
        private(mlp(), loss).backward(data())
    assert not isinstance(caught.value, NotPerSampleError)
    (note,) = caught.value.__notes__
    assert "one sample at a time" in note
    assert "x.view(x.shape[0], -1)" in note


def test_other_errors_of_the_loss_get_no_note() -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("of the loss's own")

    with pytest.raises(RuntimeError, match="of the loss's own") as caught:
        private(mlp(), loss).backward(data())
    assert not hasattr(caught.value, "__notes__")


def test_arguments_that_do_not_fit_the_loss_get_a_note() -> None:
    def loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(x if isinstance(m, Tensor) else m(x), y)

    optimizer, pair = private(mlp(), loss), (data(), data()[:, :2])
    for call in (optimizer.backward, optimizer.explain):
        with pytest.raises(
            TypeError, match=r"missing 1 required positional argument: 'y'"
        ) as caught:
            call(pair)
        (note,) = caught.value.__notes__
        assert "Sequential, tuple); the last argument is a whole batch" in note
        assert f"{call.__name__}(*batch)" in note
    with pytest.raises(TypeError) as caught:
        optimizer.backward(*pair, data())
    assert "4 arguments (Sequential, Tensor, Tensor, Tensor)." in caught.value.__notes__[0]
    with pytest.raises(TypeError) as caught:
        clipped_grad(loss, max_grad_norm=1.0)(torch.ones(4).double(), pair)
    assert "gradient(params, *batch)" in caught.value.__notes__[0]


def test_a_type_error_inside_the_loss_gets_no_note() -> None:
    with pytest.raises(TypeError) as caught:
        private(mlp(), lambda m, x: m(x, x)).backward(data())
    assert not hasattr(caught.value, "__notes__")
