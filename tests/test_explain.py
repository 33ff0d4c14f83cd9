"""The table that says how each parameter's per-sample gradient is found, and why."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import Performance, clipped_grad
from clipgrad.errors import NotPerSampleError
from clipgrad.explain import Explanation
from tests.dp_tools import assert_same, data, mlp, picture, private, squared, values

COLUMNS = ("parameter", "shape", "uses", "by", "strategy", "memory", "reason")


class Model(nn.Module):
    """A tied table, a parameter that no rule covers, two expressions of parameters, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.up, self.down = nn.Parameter(torch.ones(16, 2)), nn.Parameter(torch.ones(2, 16))
        self.packed = nn.Parameter(torch.ones(32, 16))
        self.head = nn.Linear(16, 50)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.frozen(self.table(ids)) * torch.special.expit(self.scale)
        first, second = self.packed.chunk(2)
        hidden = F.linear(hidden, first) * F.linear(hidden, second)
        return self.head(F.linear(hidden, self.up @ self.down))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


@pytest.fixture
def explanation() -> Explanation:
    return private(Model(), loss, microbatch_size=4).explain(torch.arange(96).view(8, 12) % 50)


def test_rows(explanation: Explanation) -> None:
    rows = {row.parameter: row for row in explanation.rows}
    tied = rows["table.weight"]
    assert (tied.shape, tied.uses, tied.by) == ((50, 16), 2, "embedding, linear")
    assert tied.strategy in ("kept", "ghost")
    assert tied.memory > 0
    scale = rows["scale"]
    assert (scale.uses, scale.strategy) == (1, "kept")
    assert scale.by == "fallback: special.expit"
    assert "special.expit" in scale.reason
    assert scale.memory == 4 * 16 * 4  # samples of the microbatch, elements, bytes
    bias = rows["head.bias"]
    assert (bias.shape, bias.uses, bias.by, bias.strategy) == ((50,), 1, "linear", "kept")
    assert "head.weight" not in rows  # it is the table
    assert not any(name.startswith("frozen") for name in rows)


def test_rows_of_expressions(explanation: Explanation) -> None:
    rows = {row.parameter: row for row in explanation.rows}
    for name in ("up", "down", "packed"):
        row = rows[name]
        assert (row.uses, row.by, row.strategy, row.memory) == (0, "-", "-", 0)
        assert row.reason == "through the expressions below"
    product = rows["Tensor.matmul(up, down)"]
    assert (product.shape, product.uses, product.by) == ((16, 16), 1, "linear")
    assert [row.by for row in explanation.rows if row.parameter == "Tensor.chunk(packed)"] == [
        "linear",
        "linear",
    ]
    for name in ("unused.weight", "unused.bias"):
        assert (rows[name].uses, rows[name].reason) == (0, "not used by the loss")


def test_summary(explanation: Explanation) -> None:
    assert explanation.microbatch_size == 4
    assert explanation.fallbacks == ("scale",)
    names = [row.parameter for row in explanation.rows]
    assert names.index("table.weight") < names.index("head.bias") < names.index("unused.weight")
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.rows = ()  # type: ignore[misc]


def test_text(explanation: Explanation) -> None:
    header, rule, *lines, total = str(explanation).split("\n")
    assert tuple(header.split()) == COLUMNS
    assert set(rule) == {"-", " "}
    assert len(lines) == len(explanation.rows)
    starts = [header.index(column) for column in COLUMNS]
    for line, row in zip(lines, explanation.rows, strict=True):
        assert line == line.rstrip()
        cells = [
            line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]
        assert cells[0] == row.parameter
        assert cells[1] == "x".join(map(str, row.shape))
        assert cells[2:5] == [str(row.uses), row.by, row.strategy]
        assert cells[5].split()[1] in ("B", "KiB", "MiB", "GiB")
        assert cells[6] == row.reason
    assert total.startswith("microbatch of 4: ")
    assert total.endswith("KiB beyond the ordinary step's activations")


def test_scalars_and_large_sizes_are_readable() -> None:
    def wide(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x * params["gain"]).sum() * params["table"].erfinv().sum()

    params = {"gain": torch.ones(()), "table": torch.zeros(256, 256)}
    text = str(clipped_grad(wide, max_grad_norm=1.0).explain(params, torch.ones(8, 3)))
    assert "scalar" in text
    assert "2.0 MiB" in text


@pytest.mark.parametrize("strategy", ["kept", "ghost"])
def test_a_forced_strategy_shows(strategy: str) -> None:
    optimizer = private(Model(), loss, performance=Performance(strategy=strategy))
    rows = {row.parameter: row for row in optimizer.explain(torch.arange(24).view(2, 12)).rows}
    assert rows["table.weight"].strategy == strategy
    assert rows["scale"].strategy == "kept"  # there is no other way


def test_a_memory_budget_shows() -> None:
    def strategy(budget: float | None) -> str:
        model = nn.Linear(4, 4)
        optimizer = private(
            model, lambda m, x: m(x).square().mean(), performance=Performance(memory_budget=budget)
        )
        return optimizer.explain(torch.ones(2, 3, 4)).rows[0].strategy

    assert strategy(1e9) == "kept"
    assert strategy(0) in ("kept", "ghost")


def test_explain_changes_nothing() -> None:
    model = mlp()
    optimizer, before, weights = private(model), picture(model), values(model)
    optimizer.explain(data())
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(data())
    sums = optimizer.clipped_sums
    optimizer.explain(data())
    assert_same(optimizer.clipped_sums, sums)
    assert all(p.grad is None for p in model.parameters())
    assert picture(model) == before
    assert_same(values(model), weights)
    optimizer.step()


def test_explain_changes_neither_random_numbers_nor_the_batch() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return squared(model, F.dropout(x.mul_(2.0)))

    optimizer, x, state = private(mlp(), loss), data(), torch.get_rng_state()
    optimizer.explain(x)
    assert torch.equal(x, data())
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_needs_a_sample_and_a_loss_it_can_follow() -> None:
    optimizer = private(mlp())
    with pytest.raises(ValueError, match="at least one sample"):
        optimizer.explain(data()[:0])
    optimizer.loss_fn = lambda m, x: squared(m, x) if x.sum() > 0 else squared(m, -x)
    with pytest.raises(NotPerSampleError, match=r"branches on the value"):
        optimizer.explain(data())


def test_both_choices_are_told() -> None:
    def rows(strategy: str) -> list[tuple[int, int, int]]:
        optimizer = private(Model(), loss, performance=Performance(strategy=strategy))
        found = optimizer.explain(torch.arange(24).view(2, 12))
        assert found.costs == ()
        return [(row.memory, row.kept_memory, row.ghost_memory) for row in found.rows]

    kept, ghost = rows("kept"), rows("ghost")
    assert all(memory == of_kept for memory, of_kept, _ in kept)
    assert all(memory == of_ghost for memory, _, of_ghost in ghost)
    assert any(of_kept != of_ghost for _, of_kept, of_ghost in kept)
    assert [row[1:] for row in kept] == [row[1:] for row in ghost]
