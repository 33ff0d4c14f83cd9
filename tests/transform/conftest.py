"""What the tests of the transform start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipgrad.engine.reference import Params
from tests import small_mlp


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def params() -> Params:
    return small_mlp.make_params()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return small_mlp.make_batch()
