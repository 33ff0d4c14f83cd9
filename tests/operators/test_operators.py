"""Every operator of PyTorch's database is exact, or refused by a message of clipgrad's."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.nightly import chosen
from tests.operators.database import differentiable
from tests.operators.judge import Case, cases_of, judge

needs_database = pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None,
    reason="PyTorch's database of operators needs the package expecttest",
)
SHARDS = 8

# Those whose batching rule in PyTorch is or was wrong or missing, and some of each family.
FEW = [
    "as_strided",
    "as_strided_scatter",
    "cat",
    "cdist",
    "contiguous",
    "einsum",
    "gather",
    "index_fill",
    "index_put",
    "linalg.inv",
    "linalg.solve",
    "linalg.solve_ex",
    "linalg.tensorsolve",
    "masked_fill",
    "narrow",
    "nn.functional.conv2d",
    "nn.functional.embedding",
    "nn.functional.embedding_bag",
    "nn.functional.layer_norm",
    "nn.functional.linear",
    "nn.functional.multi_head_attention_forward",
    "scatter_add",
    "select_scatter",
    "tensor_split",
    "to",
]


def name_of(operator: Any) -> str:
    return f"{operator.name}.{operator.variant_test_name}".rstrip(".")


def faults(operator: Any, samples: int | None) -> list[str]:
    found = []
    for case in cases_of(operator, samples):
        verdict = judge(case)
        if verdict.kind in ("wrong", "foreign"):
            found.append(f"{verdict.kind} ({case.road}): {verdict.reason[:200]}")
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each operator, if they are wanted: the database takes ten seconds to import."""
    if "operator" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--nightly") and importlib.util.find_spec("expecttest")
        operators = differentiable() if wanted else [None]
        metafunc.parametrize("operator", operators, ids=name_of if wanted else ["all"])


@needs_database
@pytest.mark.parametrize(
    "name", chosen(FEW, {*FEW[::2]} - {"nn.functional.multi_head_attention_forward"})
)
def test_a_few_calls_of_a_few_operators(name: str) -> None:
    operators = [operator for operator in differentiable() if operator.name == name]
    assert operators, f"the database has no {name}"
    assert not [fault for operator in operators for fault in faults(operator, 2)]


@needs_database
@pytest.mark.nightly
@pytest.mark.parametrize("shard", range(SHARDS))
def test_one_call_of_every_eighth_operator(shard: int) -> None:
    operators = differentiable()[::8][shard::SHARDS]
    assert not [fault for operator in operators for fault in faults(operator, 1)]


@needs_database
@pytest.mark.nightly
def test_all_calls(operator: Any) -> None:
    assert not faults(operator, None)


def test_the_judge_finds_a_wrong_operator() -> None:
    leaf = torch.ones(3, dtype=torch.float64)
    _, structure = torch.utils._pytree.tree_flatten(((leaf,), {}))

    def detached(x: torch.Tensor) -> torch.Tensor:
        wrapped = torch._C._functorch.is_batchedtensor(x)
        return x.detach() + 0 * x if wrapped else x

    case = Case("detached", detached, (leaf,), structure, (0,), "data")
    assert judge(case).kind == "wrong"
