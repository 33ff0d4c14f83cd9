"""Sums on a grid: what a sample adds, in Python's integers, with no tolerance anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipgrad import Performance, Relation, clipped_grad
from clipgrad.engine.reference import clipped_sum, per_sample_gradients_by_loop
from clipgrad.exact import GridArithmetic
from clipgrad.exact.grid import Grid, exact_sigma, squares_within
from clipgrad.options import Options
from tests.small_mlp import make_batch, make_params, mlp
from tests.test_sensitivity import MODELS, Model, collate, rows, tied

Params = dict[str, Tensor]
GRID = 2.0**-16


def integers(grads: Mapping[str, Tensor], grid: float = GRID) -> list[int]:
    """The sum in steps; fails unless every value is a multiple of the grid."""
    steps = torch.cat([grad.flatten() for grad in grads.values()]) / grid
    assert steps.dtype is torch.float64
    found = [int(value) for value in steps.tolist()]
    assert found == steps.tolist()
    return found


def squared_distance(first: Sequence[int], second: Sequence[int]) -> int:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def allowed(norm: float, grid: float = GRID) -> Fraction:
    return (Fraction(norm) / Fraction(grid)) ** 2


def dot(p: Params, x: Tensor) -> Tensor:
    """Its gradient is the sample itself."""
    return sum((weight * x[..., : weight.numel()]).sum() for weight in p.values())  # type: ignore[return-value]


# ------------------------------------------------------------------------------------ sensitivity

DOUBLE = Model(tied, {"table": (7, 3), "shift": (3,)}, (4, 3), torch.float64)
CHOSEN = {name: MODELS[name] for name in ("cnn", "tied", "regression", "difference", "sliced")} | {
    "tied, float16": MODELS["tied, float16"],
    "tied, float64": DOUBLE,
}


@pytest.mark.parametrize("model", CHOSEN.values(), ids=CHOSEN)
@settings(deadline=None, derandomize=True, max_examples=20, database=None)
@given(
    others=st.lists(rows, max_size=2),
    sample=rows,
    replacement=rows,
    norm=st.sampled_from([0.1, 1.0, 30.0]),
    grouped=st.booleans(),
    fine=st.booleans(),
)
def test_neighbours(
    model: Model,
    others: list[tuple[str, int]],
    sample: tuple[str, int],
    replacement: tuple[str, int],
    norm: float,
    grouped: bool,
    fine: bool,
) -> None:
    first, *rest = model.params
    norms = {first: norm / 2, **({"": norm} if rest else {})} if grouped else norm
    grid = 2.0 ** (math.frexp(norm)[1] - (26 if fine else 5))
    gradient = clipped_grad(model.loss, max_grad_norm=norms, grid=grid)
    params = model.make()

    def compute(drawn: list[tuple[str, int]], padded: bool = False) -> list[int]:
        mask = torch.arange(len(drawn)) == len(others) if padded else None
        return integers(gradient(params, *collate(model, drawn), is_padding=mask).grads, grid)

    without, with_sample = compute(others), compute([*others, sample])
    with_other = compute([*others, replacement])
    padded = compute([*others, sample], padded=True)
    squares = [Fraction(n) ** 2 for n in (norms.values() if isinstance(norms, dict) else [norms])]
    bound = sum(squares) / Fraction(grid) ** 2
    assert squared_distance(without, with_sample) <= bound
    assert squared_distance(with_sample, with_other) <= 4 * bound
    assert padded == without


@st.composite
def halves(draw: st.DrawFn) -> tuple[list[float], int]:
    """Gradients just beyond the middle between two grid points, from where rounding leads away from zero."""
    size = draw(st.integers(1, 40))
    steps = draw(st.lists(st.integers(-60, 60), min_size=size, max_size=size))
    beyond = draw(st.sampled_from([2.0**-40, 2.0**-20, 1e-3]))
    values = [n + math.copysign(0.5 + beyond, n) for n in steps]
    slack = draw(st.sampled_from([0.0, 1e-9, 1e-3, 0.4]))
    return values, math.ceil(math.hypot(*values) - slack)


@settings(deadline=None, derandomize=True, max_examples=300, database=None)
@example(row=([10.5 + 2.0**-40] * 16, 42), scale=1.0)
@given(row=halves(), scale=st.sampled_from([1.0, 1.0, 7.3, 1e8]))
def test_rounding_away_from_zero(row: tuple[list[float], int], scale: float) -> None:
    values, norm = row
    if norm < math.sqrt(len(values)):
        return  # too coarse a grid, refused
    x = torch.tensor([values], dtype=torch.float64)
    gradient = clipped_grad(dot, max_grad_norm=norm * GRID, grid=GRID)
    result = gradient({"w": torch.zeros(len(values), dtype=torch.float64)}, x * GRID * scale)
    assert sum(n**2 for n in integers(result.grads)) <= norm**2
    assert result.num_nonfinite == 0  # within by the smaller norm, not by being dropped


def test_clipping_to_the_norm_itself_would_exceed_it() -> None:
    """What the test above is about: the same row, clipped to C and rounded, is longer than C."""
    values = [10.5 + 2.0**-40] * 16
    factor = min(1.0, 42.5 / math.hypot(*values))
    assert math.hypot(*(round(v * factor) for v in values)) > 42.5


@pytest.mark.parametrize("limit", [1, 2, 99, 2**52 - 1, 2**52, 2**53 - 1])
def test_the_comparison_is_exact(limit: int) -> None:
    """Next to the limit, far beyond 2**53, and in whatever order the squares are added."""
    root = math.isqrt(limit)
    candidates = [[root], [root, 1], [root + 1], [2**26, 1], [2**26], [2**40, 0, 1], [2**300, 1.0]]
    candidates += [[1] * limit, [1] * (limit + 1)] if limit < 100 else []
    candidates += [[2**25, 2**25, 2**25, n] for n in (2**25 - 1, 2**25, 2**25 + 1)]
    candidates += [[2**25 + 1] * 2 + [1] * 9]
    candidates += [[math.nan, 0], [math.inf, 0]]
    for numbers in candidates:
        row = torch.tensor([numbers], dtype=torch.float64)
        finite = all(map(math.isfinite, numbers))
        expected = finite and sum(int(n) ** 2 for n in numbers) <= limit
        for parts in ([row], [row.flip(1)], [row[:, :1], row[:, 1:]]):
            assert bool(squares_within(parts, limit)) == expected, (limit, numbers)


def test_a_sample_that_fails_the_comparison_contributes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Grid, "_target", lambda self, group: 1.01 * self.clipping.norms[group] / self.spacing
    )
    gradient = clipped_grad(dot, max_grad_norm=1.0, grid=GRID)
    x = torch.tensor([[3.0, 4.0], [0.25, 0.5], [0.0, 9.0]])
    result = gradient({"w": torch.zeros(2)}, x)
    assert result.grads["w"].tolist() == [0.25, 0.5]
    assert result.num_nonfinite == 2


@pytest.mark.parametrize(
    ("norm", "relation", "expected"),
    [
        (0.7, Relation.ADD_OR_REMOVE_ONE, 0.7),
        (0.7, Relation.REPLACE_SPECIAL, 0.7),
        (0.7, Relation.REPLACE_ONE, 1.4),
        ({"a": 3.0, "b": 4.0}, Relation.ADD_OR_REMOVE_ONE, 5.0),
    ],
)
def test_sensitivity(norm: Any, relation: Relation, expected: float) -> None:
    assert clipped_grad(dot, max_grad_norm=norm, grid=2.0**-20).sensitivity(relation) == expected


@given(norms=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=5))
def test_sensitivity_of_groups_is_never_rounded_down(norms: list[float]) -> None:
    groups = {str(index): norm for index, norm in enumerate(norms)}
    bound = clipped_grad(dot, max_grad_norm=groups, grid=2.0**-20).sensitivity()
    squared = sum(Fraction(norm) ** 2 for norm in norms)
    assert Fraction(bound) ** 2 >= squared > Fraction(math.nextafter(bound, 0)) ** 2


@given(multiplier=st.floats(1e-3, 50), bound=st.floats(1e-3, 50))
@example(multiplier=0.1, bound=3.0)
@example(multiplier=1.1, bound=1.1)
def test_sigma_is_never_rounded_down(multiplier: float, bound: float) -> None:
    sigma, exact = exact_sigma(multiplier, bound), Fraction(multiplier) * Fraction(bound)
    assert Fraction(sigma) >= exact > Fraction(math.nextafter(sigma, 0))


# ------------------------------------------------------------------------------------ results


def convolutional() -> tuple[Params, tuple[Tensor, Tensor, Tensor]]:
    model = MODELS["cnn"]
    return model.make(), collate(model, [("ordinary", seed) for seed in range(11)])  # type: ignore[return-value]


@pytest.mark.parametrize("microbatch_size", [None, 1, 2, 7])
def test_equal_to_the_bit(microbatch_size: int | None) -> None:
    """Whatever the microbatch, the order, and who else is there."""
    params, batch = convolutional()
    loss = MODELS["cnn"].loss
    whole = clipped_grad(loss, max_grad_norm=0.3, grid=GRID)(params, *batch)
    gradient = clipped_grad(loss, max_grad_norm=0.3, grid=GRID, microbatch_size=microbatch_size)
    for order in (torch.arange(11), torch.arange(10, -1, -1), torch.randperm(11)):
        shuffled = tuple(column[order] for column in batch)
        assert integers(gradient(params, *shuffled).grads) == integers(whole.grads)
    strided = tuple(column.movedim(0, -1).contiguous().movedim(-1, 0) for column in batch)
    assert integers(gradient(params, *strided).grads) == integers(whole.grads)
    single = [gradient(params, *(column[i : i + 1] for column in batch)) for i in range(11)]
    together = [sum(column) for column in zip(*(integers(r.grads) for r in single), strict=True)]
    assert together == integers(whole.grads)
    assert torch.equal(torch.cat([r.grad_norms for r in single]), whole.grad_norms)


def test_a_sample_has_memory_of_its_own() -> None:
    """Laid out and aligned as any other: kernels may round by either."""
    memory = torch.randn(3, 5, 7)
    for batch in (memory, memory.permute(0, 2, 1), memory[..., 1:]):
        (leaf, constant) = GridArithmetic(GRID, Options()).samples([batch[1:2], 3])
        assert isinstance(leaf, Tensor)
        assert (torch.equal(leaf, batch[1:2]), constant) == (True, 3)
        assert leaf.is_contiguous()
        assert leaf.data_ptr() % 64 == 0
        assert leaf.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr()


def test_close_to_the_definition() -> None:
    """Rounding costs half a step an element and sample, and the smaller norm its share."""
    params, batch = make_params(), make_batch()
    size = sum(p.numel() for p in params.values())
    rows = per_sample_gradients_by_loop(mlp, params, *batch)[1]
    norm = 0.3
    expected, norms = clipped_sum(rows, norm)
    result = clipped_grad(mlp, max_grad_norm=norm, grid=GRID)(params, *batch)
    slack = len(norms) * GRID * (0.5 + math.sqrt(size) / 2) * 1.001
    for name, total in expected.items():
        assert (result.grads[name] - total).abs().max() <= slack
    torch.testing.assert_close(result.grad_norms, norms)
    assert result.num_clipped == (norms > norm).sum() > 0
    assert result.batch_size == len(norms)


def test_samples_that_are_not_finite_or_padding() -> None:
    gradient = clipped_grad(dot, max_grad_norm={"a": 1.0, "b": 2.0}, grid=GRID)
    params = {"a": torch.zeros(2), "b": torch.zeros(3)}
    x = torch.tensor([[0.5, 0.25, 0.0], [math.nan] * 3, [0, 0, math.inf], [1e38] * 3, [0.5] * 3])
    padding = torch.tensor([False, False, False, False, True])
    result = gradient(params, x, is_padding=padding)
    alone = gradient(params, x[[0, 3]])
    assert integers(result.grads) == integers(alone.grads)
    assert (result.num_nonfinite, result.num_clipped, result.batch_size) == (2, 1, 4)
    # inf stands in the group b alone; the whole sample is dropped
    assert integers(gradient(params, x[2:3]).grads) == [0] * 5


def test_empty_batch() -> None:
    result = clipped_grad(dot, max_grad_norm=1.0, grid=GRID)(
        {"w": torch.zeros(3)}, torch.zeros(0, 3)
    )
    assert integers(result.grads) == [0, 0, 0]
    assert result.batch_size == 0


def test_a_transform_of_gradients() -> None:
    gradient = clipped_grad(
        dot, max_grad_norm=1.0, grid=GRID, pre_clipping_transform=lambda g: {"w": -2 * g["w"]}
    )
    result = gradient({"w": torch.zeros(2)}, torch.tensor([[0.25, 0.0], [0.0, 0.125]]))
    assert result.grads["w"].tolist() == [-0.5, -0.25]


def test_scalars_unused_parameters_and_no_negative_zero() -> None:
    params = {"s": torch.zeros(()), "unused": torch.zeros(4)}
    gradient = clipped_grad(lambda p, x: (p["s"] * x).sum(), max_grad_norm=1.0, grid=GRID)
    result = gradient(params, torch.tensor([0.5, -1e-9]))
    assert result.grads["s"] == 0.5
    assert result.grads["s"].shape == ()
    assert torch.equal(result.grads["unused"], torch.zeros(4, dtype=torch.float64))
    assert not torch.signbit(gradient(params, torch.tensor([-1e-9])).grads["s"])


def test_explain_looks_at_one_sample() -> None:
    params, batch = convolutional()
    gradient = clipped_grad(MODELS["cnn"].loss, max_grad_norm=1.0, grid=GRID)
    assert gradient.explain(params, *batch).microbatch_size == 1


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("grid", [0.1, 3.0, 2.0**-20 * (1 + 2**-52), 1e-3])
def test_not_a_power_of_two(grid: float) -> None:
    below = 2.0 ** math.floor(math.log2(grid))
    with pytest.raises(
        ValueError, match=f"power of two, .* got {grid}; .* {below} and {2 * below}"
    ):
        clipped_grad(dot, max_grad_norm=10.0, grid=grid)
    clipped_grad(dot, max_grad_norm=10.0, grid=below)


@pytest.mark.parametrize("grid", [0.0, -1.0, math.nan, math.inf, True, "1", 2.0**-1000, 2.0**1000])
def test_not_a_spacing(grid: Any) -> None:
    with pytest.raises(ValueError, match="grid must be a"):
        clipped_grad(dot, max_grad_norm=1.0, grid=grid)


@pytest.mark.parametrize("norm", [1.0, 0.7, 3e-5])
def test_too_fine_and_too_coarse(norm: float) -> None:
    with pytest.raises(ValueError, match="too fine") as refused:
        clipped_grad(dot, max_grad_norm=norm, grid=2.0**-60)
    finest = float(str(refused.value).rsplit(maxsplit=1)[1].rstrip("."))
    params, x = {"w": torch.zeros(50)}, torch.ones(1, 50)
    with pytest.raises(ValueError, match=r"too coarse.*50 elements") as refused:
        clipped_grad(dot, max_grad_norm=norm, grid=1.0)(params, x)
    coarsest = float(str(refused.value).rsplit(maxsplit=1)[1].rstrip("."))
    for works, wrong in ((finest, finest / 2), (coarsest, coarsest * 2)):
        gradient = clipped_grad(dot, max_grad_norm=norm, grid=works)
        total = integers(gradient(params, x).grads, works)
        assert 0 < sum(n**2 for n in total) <= allowed(norm, works)
        with pytest.raises(ValueError, match="too"):
            clipped_grad(dot, max_grad_norm=norm, grid=wrong)(params, x)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("normalize_by", 2.0),
        ("nan_safe", False),
        ("compile", True),
        ("compile", "reduce-overhead"),
    ],
)
def test_options_that_cannot_be_exact(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"grid cannot be combined with {option}"):
        clipped_grad(dot, max_grad_norm=1.0, grid=GRID, **{option: value})


def test_sums_on_a_grid_are_float64() -> None:
    with pytest.raises(ValueError, match="grid cannot be combined with accumulate_dtype"):
        clipped_grad(
            dot,
            max_grad_norm=1.0,
            grid=GRID,
            performance=Performance(accumulate_dtype=torch.float32),
        )
    clipped_grad(
        dot, max_grad_norm=1.0, grid=GRID, performance=Performance(accumulate_dtype=torch.float64)
    )


@pytest.mark.parametrize("norm", [0.0, math.inf, {"a": 1.0, "b": 0.0}])
def test_norms_that_cannot_be_rounded(norm: Any) -> None:
    with pytest.raises(ValueError, match="positive, finite max_grad_norm"):
        clipped_grad(dot, max_grad_norm=norm, grid=GRID)


def test_too_many_samples() -> None:
    """A batch axis of stride zero, so that it costs no memory."""
    gradient = clipped_grad(dot, max_grad_norm=1.0, grid=GRID)
    with pytest.raises(ValueError, match=r"more than the 2..26 samples"):
        gradient({"w": torch.zeros(1)}, torch.zeros(1, 1).expand(2**26 + 1, 1))
