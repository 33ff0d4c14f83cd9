"""One sample, whatever it holds, moves the result by no more than .sensitivity() says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipgrad import (
    AdaptiveQuantile,
    Automatic,
    Performance,
    PerLayer,
    Relation,
    clipped_grad,
)
from clipgrad.clipping import StepState
from clipgrad.function import ClippedGrad
from clipgrad.result import ClippedGradResult
from tests.nightly import chosen

Params = dict[str, Tensor]
Rows = tuple[Tensor, ...]

# What docs/guarantees.md allows for rounding: one part in 1e5 of what every sample of the batch may contribute.
ROUNDING = 1e-5
WORDS = 7


@dataclass(frozen=True)
class Model:
    """A loss with parameters by name; ``shape`` is that of its floating-point input.

    Half-precision matrix products round differently for batches of different size, which moves the others' gradients
    as well: ``rounding`` is then that of the dtype.
    """

    loss: Callable[..., Tensor]
    params: dict[str, tuple[int, ...]]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    rounding: float = ROUNDING
    autocast: torch.dtype | None = None

    def make(self) -> Params:
        generator = torch.Generator().manual_seed(0)
        return {
            name: (0.5 * torch.randn(*size, generator=generator)).to(self.dtype)
            for name, size in self.params.items()
        }


def cnn(p: Params, x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    h = F.relu(F.conv2d(x, p["conv.w"], p["conv.b"], padding=1))
    h = F.relu(F.conv2d(h, p["deep.w"], stride=2))
    return F.cross_entropy(F.linear(h.flatten(1), p["out.w"]).float(), y)


def tied(p: Params, x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    h = F.embedding(ids, p["table"]) * x + p["shift"]
    return F.cross_entropy(F.linear(h, p["table"]).flatten(0, 1), ids.flatten())


def normalised(p: Params, x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    h = F.layer_norm(F.linear(x, p["in.w"], p["in.b"]), (4,), p["norm.w"], p["norm.b"])
    return F.cross_entropy(F.linear(h.tanh(), p["out.w"]).float(), y)


def regression(p: Params, x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    """Nothing bounds the output gradient, and it is the data's to choose."""
    return (F.linear(x[:, 0], p["w"], p["b"]) * x[:, 1]).sum()


def difference(p: Params, x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    """Two uses of one weight whose gradients all but cancel when the positions are alike."""
    first, second = F.linear(x, p["w"]).unbind(1)
    return (first - second).sum() + F.linear(x, p["w"]).mean() * 1e-3


def sliced(p: Params, x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    """Expressions of parameters: a packed weight in views, and a computed one."""
    query, key = p["packed"].chunk(2)
    return (F.linear(x, query).tanh() * F.linear(x, key @ (p["low"] @ p["rank"]))).sum()


CNN = {"conv.w": (3, 2, 3, 3), "conv.b": (3,), "deep.w": (4, 3, 2, 2), "out.w": (3, 16)}
MLP = {"in.w": (4, 5), "in.b": (4,), "norm.w": (4,), "norm.b": (4,), "out.w": (3, 4)}
SLICED = {"packed": (6, 4), "low": (4, 1), "rank": (1, 4)}
HALF: dict[str, Any] = {"dtype": torch.float16, "rounding": 5e-3}
MODELS = {
    "cnn": Model(cnn, CNN, (2, 5, 5)),
    "tied": Model(tied, {"table": (WORDS, 3), "shift": (3,)}, (4, 3)),
    "normalised": Model(normalised, MLP, (5,)),
    "regression": Model(regression, {"w": (3, 3), "b": (3,)}, (2, 3)),
    # Where a gradient all but cancels, norm and sum may differ by one part in a hundred of the clipping norm.
    "difference": Model(difference, {"w": (3, 6)}, (2, 6), rounding=1e-2),
    "sliced": Model(sliced, SLICED, (3, 4)),
    "cnn, float16": Model(cnn, CNN, (2, 5, 5), **HALF),
    "tied, float16": Model(tied, {"table": (WORDS, 3), "shift": (3,)}, (4, 3), **HALF),
    "normalised, float16": Model(normalised, MLP, (5,), **HALF),
    "sliced, bfloat16": Model(sliced, SLICED, (3, 4), torch.bfloat16, 4e-2),
    "cnn, autocast": Model(cnn, CNN, (2, 5, 5), rounding=4e-2, autocast=torch.bfloat16),
    "normalised, autocast": Model(normalised, MLP, (5,), rounding=5e-3, autocast=torch.float16),
    "difference, autocast": Model(
        difference, {"w": (3, 6)}, (2, 6), rounding=4e-2, autocast=torch.bfloat16
    ),
}

# What one row may hold, applied to a normal row.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda row: row,
    "NaN": lambda row: row.masked_fill(row > 0, torch.nan),
    "inf": lambda row: row.masked_fill(row > 0, torch.inf),
    "-inf": lambda row: torch.full_like(row, -torch.inf),
    "huge": lambda row: 1e30 * row,
    "overflow": lambda row: 3e19 * row,  # its square does not fit float32
    "float16 overflow": lambda row: 6e4 * row,
    "large": lambda row: 1e3 * row,
    "tiny": lambda row: 1e-30 * row,
    "huge and tiny": lambda row: torch.cat([1e-23 * row[:1], 1e18 * row[1:]]),
    "zero": lambda row: 0 * row,
    "nearly equal positions": lambda row: 1e4 * row[:1] + 0.5 * row,
    "equal positions": lambda row: row[:1].expand_as(row).contiguous(),
}  # fmt: skip

rows = st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 3))
ways: dict[str, st.SearchStrategy[Any]] = {
    "normalize_by": st.sampled_from([1.0, 7.0]),
    "microbatch_size": st.sampled_from([None, 1, 2]),
    "performance": st.builds(Performance, strategy=st.sampled_from(["auto", "kept", "ghost"])),
}
clippings: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "max_grad_norm": st.sampled_from([1e-3, 0.1, 1.0, 30.0, "grouped"]),
        **ways,
    }
)
strategies: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "max_grad_norm": st.sampled_from(
            [
                Automatic(1.0),
                Automatic(30.0, gamma=1e-3),
                PerLayer(0.5),
                PerLayer(0.5, weights="size"),
                PerLayer(Automatic(1.0)),
                {"": Automatic(2.0)},
            ]
        ),
        **ways,
    }
)


def collate(model: Model, drawn: list[tuple[str, int]]) -> Rows:
    samples = []
    for kind, seed in drawn:
        generator = torch.Generator().manual_seed(seed)
        x = KINDS[kind](torch.randn(model.shape, generator=generator)).to(model.dtype)
        ids = torch.randint(WORDS, (4,), generator=generator)
        samples.append((x, ids, torch.randint(3, (), generator=generator)))
    if not samples:
        empty = torch.zeros(0, *model.shape, dtype=model.dtype)
        return empty, torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return tuple(torch.stack(column) for column in zip(*samples, strict=True))


def transform(model: Model, options: dict[str, Any]) -> ClippedGrad:
    norm = options["max_grad_norm"]
    if norm == "grouped":
        names = list(model.params)
        norm = {names[0]: 0.5} if len(names) == 1 else {names[0]: 0.5, "": 2.0}
    return clipped_grad(lowered(model), **{**options, "max_grad_norm": norm})


def lowered(model: Model) -> Callable[..., Tensor]:
    """The model's loss, under autocast if the model asks for it."""
    if model.autocast is None:
        return model.loss

    def loss(*args: Any) -> Tensor:
        with torch.autocast("cpu", model.autocast):
            return model.loss(*args).float()

    return loss


def distance(first: Params, second: Params) -> float:
    gap = [(first[name].double() - second[name].double()).flatten() for name in first]
    return float(torch.cat(gap).norm())


@dataclass(frozen=True)
class Neighbours:
    """Batches that differ in one sample, and what a transform makes of them."""

    without: ClippedGradResult
    with_sample: ClippedGradResult
    with_other: ClippedGradResult
    null: ClippedGradResult
    size: int

    @classmethod
    def make(
        cls,
        model: Model,
        gradient: ClippedGrad,
        others: list[tuple[str, int]],
        sample: tuple[str, int],
        replacement: tuple[str, int],
        at: int,
    ) -> Neighbours:
        params = model.make()

        def compute(drawn: list[tuple[str, int]], padded: int | None = None) -> ClippedGradResult:
            mask = None if padded is None else torch.arange(len(drawn)) == padded
            result = gradient(params, *collate(model, drawn), is_padding=mask)
            assert all(g.isfinite().all() for g in result.grads.values())
            return result

        place = min(at, len(others))
        large = [*others[:place], sample, *others[place:]]
        changed = [*others[:place], replacement, *others[place:]]
        return cls(
            compute(others), compute(large), compute(changed), compute(large, place), len(large)
        )

    def pairs(self) -> list[tuple[Relation, ClippedGradResult, ClippedGradResult]]:
        return [
            (Relation.ADD_OR_REMOVE_ONE, self.without, self.with_sample),
            (Relation.REPLACE_ONE, self.with_sample, self.with_other),
            (Relation.REPLACE_SPECIAL, self.with_sample, self.null),
        ]


def check(model: Model, gradient: ClippedGrad, neighbours: Neighbours) -> None:
    for relation, one, other in neighbours.pairs():
        bound = gradient.sensitivity(relation)
        slack = model.rounding * gradient.sensitivity() * neighbours.size
        assert distance(one.grads, other.grads) <= bound + slack, relation


batches: dict[str, st.SearchStrategy[Any]] = {
    "others": st.lists(rows, max_size=4),
    "sample": rows,
    "replacement": rows,
    "at": st.integers(0, 4),
}


@pytest.mark.parametrize(
    "name",
    chosen(MODELS, {"regression", "cnn, float16", "sliced, bfloat16", "difference, autocast"}),
)
@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(drawn=st.fixed_dictionaries(batches), options=clippings)
def test_neighbours(name: str, drawn: dict[str, Any], options: dict[str, Any]) -> None:
    model = MODELS[name]
    gradient = transform(model, options)
    check(model, gradient, Neighbours.make(model, gradient, **drawn))


@pytest.mark.parametrize("name", chosen(MODELS, {"cnn", "difference", "normalised, float16"}))
@settings(deadline=None, derandomize=True, max_examples=25, database=None)
@given(drawn=st.fixed_dictionaries(batches), options=strategies)
def test_neighbours_of_strategies(
    name: str, drawn: dict[str, Any], options: dict[str, Any]
) -> None:
    model = MODELS[name]
    gradient = transform(model, options)
    check(model, gradient, Neighbours.make(model, gradient, **drawn))


@pytest.mark.parametrize("name", ["cnn", "regression", "tied, float16"])
@settings(deadline=None, derandomize=True, max_examples=25, database=None)
@given(
    drawn=st.fixed_dictionaries(batches),
    norm=st.sampled_from([0.1, 1.0, 30.0]),
    multiplier=st.sampled_from([0.3, 2.9]),
    normalised=st.booleans(),
)
def test_neighbours_of_an_adaptive_norm(
    name: str, drawn: dict[str, Any], norm: float, multiplier: float, normalised: bool
) -> None:
    """Sum and count together, in units of their noise: one sample moves them by 1 / multiplier at most."""
    model, quantile = MODELS[name], AdaptiveQuantile(norm, count_stddev=3.0)
    step_state = StepState.start(Automatic(quantile) if normalised else quantile, multiplier)
    gradient = clipped_grad(model.loss, max_grad_norm=step_state.max_grad_norm)
    for relation, one, other in (neighbours := Neighbours.make(model, gradient, **drawn)).pairs():
        z, stddev = step_state.noise(relation, expected_batch_size=20)
        counts = [step_state.observed_sums(result.outcome)[0] for result in (one, other)]
        moved = distance(one.grads, other.grads) / (z * gradient.sensitivity(relation))
        count = float((counts[0] - counts[1]).abs()) / stddev
        slack = model.rounding * neighbours.size / z
        assert math.hypot(moved, count) <= 1 / multiplier + slack, relation


@pytest.mark.parametrize("strategy", ["auto", "kept", "ghost"])
@pytest.mark.parametrize("gap", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_cancelling_positions(size: float, gap: float, strategy: str) -> None:
    """Gram matrices in float32 find a norm of zero here, and zero means: do not clip."""
    generator = torch.Generator().manual_seed(0)
    x = size * torch.randn(20, 1, 64, generator=generator) + gap * torch.randn(
        20, 2, 64, generator=generator
    )
    params = {"w": torch.randn(64, 64, generator=generator)}
    gradient = clipped_grad(
        lambda p, x: F.linear(x, p["w"]).diff(dim=1).sum(),
        max_grad_norm=1.0,
        performance=Performance(strategy=strategy),
    )
    for i in range(len(x)):
        assert gradient(params, x[i : i + 1]).grads["w"].norm() <= 1 + 1e-2


@pytest.mark.parametrize("strategy", ["auto", "kept", "ghost"])
def test_vanishing_squares(strategy: str) -> None:
    """Inputs whose squares are zero in float32, and output gradients that make up for it."""
    x, y = torch.full((1, 10_000), 2e-23), torch.full((1, 4), 5e18)
    gradient = clipped_grad(
        lambda p, x, y: (F.linear(x, p["w"]) * y).sum(),
        max_grad_norm=1e-3,
        performance=Performance(strategy=strategy),
    )
    total = gradient({"w": torch.ones(4, 10_000)}, x, y).grads["w"]
    assert total.double().norm() <= 1e-3 * (1 + 1e-3)


def test_the_bound_is_tight() -> None:
    """Two samples that pull in opposite directions use all of it."""
    gradient = clipped_grad(lambda w, x: (w * x).sum(), max_grad_norm={"": 0.5})
    w, x = torch.zeros(3), torch.tensor([[1.0, 2.0, 2.0], [-1.0, -2.0, -2.0]])
    first, second = (gradient(w, x[i : i + 1]).grads for i in range(2))
    assert math.isclose(float(first.norm()), gradient.sensitivity(), rel_tol=1e-6)
    assert math.isclose(
        float((first - second).norm()), gradient.sensitivity(Relation.REPLACE_ONE), rel_tol=1e-6
    )
