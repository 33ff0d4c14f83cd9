"""Batches as data pipelines make them: encodings, arguments by name, columns of strings, streams."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from clipgrad import DPOptimizer, PrivacyPlan, poisson_loader
from clipgrad.errors import UnaccountedBatchError
from clipgrad.sampling import PaddedBatch
from tests.dp_tools import clipped, data, mlp, private, sgd, squared


def by_mapping(model: nn.Module, batch: Any) -> Tensor:
    assert type(batch) is dict
    return named(model, **batch)


def named(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    return squared(model, x * scale[:, None])


def columns() -> dict[str, Tensor]:
    return {"x": data(5), "scale": torch.linspace(0.5, 2, 5, dtype=torch.float64)}


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that is no pytree, as Hugging Face's ``BatchEncoding``."""


class Columns(dict):  # type: ignore[type-arg]
    """A subclass of ``dict``, which is no pytree either."""


def assert_sums(optimizer: DPOptimizer[Any], model: nn.Module) -> None:
    sums, _ = clipped(model, columns()["x"] * columns()["scale"][:, None])
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [Encoding, Columns])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_mapping_is_a_batch(microbatch_size: int | None, kind: Any) -> None:
    model = mlp()
    optimizer = private(model, by_mapping, microbatch_size=microbatch_size)
    optimizer.backward(kind(columns()))
    assert_sums(optimizer, model)
    second = private(
        model, lambda model, x, more: named(model, x, **more), microbatch_size=microbatch_size
    )
    second.backward(columns()["x"], kind(scale=columns()["scale"]))
    assert_sums(second, model)


def test_hugging_faces_own_encoding() -> None:
    transformers = pytest.importorskip("transformers")
    model = mlp()
    optimizer = private(model, by_mapping)
    optimizer.backward(transformers.BatchEncoding(columns()))
    assert_sums(optimizer, model)


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}])
def test_a_batch_by_name(options: dict[str, Any]) -> None:
    model = mlp()
    optimizer = private(model, named, **options)
    optimizer.backward(**columns())
    assert_sums(optimizer, model)
    optimizer.zero_grad()
    optimizer.backward(columns()["x"], scale=columns()["scale"])
    assert_sums(optimizer, model)
    optimizer.zero_grad()
    optimizer.backward(*columns().values())
    assert_sums(optimizer, model)
    assert "linear" in str(optimizer.explain(**columns()))
    twin = copy.deepcopy(optimizer)
    twin.backward(**columns())
    assert_sums(twin, model)


def test_a_batch_by_name_with_a_loss_that_is_captured() -> None:
    """The loss asks for a value, so PyTorch captures it, once for all batches."""

    def asks(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and bool(scale.all()):  # as masks of Hugging Face
            return x.sum()
        return named(model, x, scale)

    model = mlp()
    optimizer = private(model, asks)
    for _ in range(2):
        optimizer.backward(**columns())
        assert_sums(optimizer, model)
        optimizer.zero_grad()


def test_padding_by_name() -> None:
    model = mlp()
    is_padding = torch.tensor([False] * 5 + [True] * 2)
    longer = {k: torch.cat([v, v[:2]]) for k, v in columns().items()}
    optimizer = private(model, named)
    optimizer.backward(is_padding=is_padding, **longer)
    assert_sums(optimizer, model)
    optimizer = private(model, by_mapping)
    optimizer.backward(PaddedBatch(Encoding(longer), is_padding))
    assert_sums(optimizer, model)


def test_a_wrong_name_is_the_losses_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'padding'"):
        private(mlp(), squared).backward(data(), padding=torch.zeros(5, dtype=torch.bool))


STRINGS = {"x": data(5), "scale": columns()["scale"], "text": ["a"] * 5, "name": ("b",) * 5}


@pytest.mark.parametrize("kind", [dict, Encoding, "by name"])
def test_columns_of_strings_are_dropped_with_a_warning(kind: Any) -> None:
    model = mlp()
    optimizer = private(model, named if kind == "by name" else by_mapping)
    arguments, names = ((), STRINGS) if kind == "by name" else ((kind(STRINGS),), {})
    with pytest.warns(UserWarning, match="columns 'text', 'name' hold strings.*dropped") as caught:
        optimizer.backward(*arguments, **names)
    assert caught[0].filename == __file__
    assert_sums(optimizer, model)


def test_other_columns_without_an_axis_of_samples_are_still_refused() -> None:
    with pytest.raises(ValueError, match="list of 5 Python values"):
        private(mlp(), by_mapping).backward({**columns(), "labels": [1, 2, 3, 4, 5]})


def plan_of(**options: Any) -> PrivacyPlan:
    defaults = {
        "num_samples": 40,
        "expected_batch_size": 8,
        "steps": 5,
        "delta": 1e-3,
        "noise_multiplier": 1.0,
        "accountant": "rdp",
    }
    return PrivacyPlan(**{**defaults, **options})


def with_plan(plan: PrivacyPlan, loss: Any, model: nn.Module) -> DPOptimizer[Any]:
    return DPOptimizer(sgd(model), model, loss, plan=plan)


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.arange(4, dtype=torch.float64) + index
        return {"x": x, "scale": torch.tensor(1.0, dtype=torch.float64), "text": f"row {index}"}


def as_encoding(rows: list[dict[str, Any]]) -> Encoding:
    return Encoding({k: torch.stack([row[k] for row in rows]) for k in ("x", "scale")})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plan_knows_the_batches_of_encodings_and_names(workers: int) -> None:
    for by in ("mapping", "name"):
        plan = plan_of()
        options = {"num_workers": workers, "prefetch_factor": 3 if workers else None}
        loader = poisson_loader(Rows(), plan=plan, collate_fn=as_encoding, **options)
        optimizer = with_plan(plan, by_mapping if by == "mapping" else named, mlp())
        for batch in loader:
            assert isinstance(batch, Encoding)
            if by == "mapping":
                optimizer.backward(batch)
            else:
                optimizer.backward(**batch)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.ledger.steps == 5


def test_a_loader_of_rows_with_strings() -> None:
    plan = plan_of()
    optimizer = with_plan(plan, by_mapping, mlp())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*columns 'text' hold strings.*")
        for batch in poisson_loader(Rows(), plan=plan):
            optimizer.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.ledger.steps == 5


# ------------------------------------------------------------------------------------ time first


def time_first(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def take_step(optimizer: DPOptimizer[Any], batch: Tensor) -> None:
    optimizer.backward(batch)
    optimizer.step()


@pytest.mark.parametrize("length", [3, 9, 41])
def test_time_first_is_refused_by_the_receipt(length: int) -> None:
    """The first axis has as many entries as steps in time, and not as the loader has drawn samples."""
    plan = plan_of(expected_batch_size=20)
    x = torch.randn(40, length, 4, dtype=torch.float64)
    optimizer = with_plan(plan, time_first, mlp())
    for (batch,) in poisson_loader(TensorDataset(x), plan=plan):
        if len(batch) == length:
            continue

        with pytest.raises(UnaccountedBatchError, match="The sample axis must come first"):
            take_step(optimizer, batch.transpose(0, 1).contiguous())
        break


def test_a_collate_function_that_puts_time_first_is_refused_by_the_loader() -> None:
    x = torch.randn(40, 6, 4)
    with pytest.raises(TypeError, match="return tensors whose first axis is the batch"):
        poisson_loader(
            TensorDataset(x),
            plan=plan_of(),
            collate_fn=lambda rows: torch.stack([row[0] for row in rows], dim=1),
        )


# -------------------------------------------------------------------------------------- streams


class Stream(IterableDataset[Tensor]):
    """A service that sends each row of a large table with probability q."""

    def __iter__(self) -> Any:
        return iter(data(40))


def test_a_stream_is_declared() -> None:
    with pytest.raises(TypeError, match=r"got Stream.*PrivacyPlan\(declared_sampling="):
        poisson_loader(Stream(), plan=plan_of())
    plan = plan_of(declared_sampling="rows of a service, each with probability 0.2")
    model = mlp()
    optimizer = with_plan(plan, squared, model)
    for batch in DataLoader(Stream(), batch_size=8):
        sums, _ = clipped(model, batch)
        optimizer.backward(batch)
        torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
    assert [entry.declared for entry in optimizer.ledger.history] == [plan.declared_sampling]
    assert "Declared, not checked: rows of a service" in str(plan)
