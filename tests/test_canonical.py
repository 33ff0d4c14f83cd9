"""The algebra of rules/canonical.py against einsum, on factors of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipgrad.engine.tracked import Strategy, Tracked
from clipgrad.kernels.float32_precision import product_rounding
from clipgrad.rules import OneHot, Outer, PerSample, Use, ghost, gram
from clipgrad.rules.canonical import weighted_sum_of
from clipgrad.rules.ghost import ghost_norms_squared, lengths_of, raised_to_rounding_bound
from clipgrad.rules.row_norms import row_norms_squared
from tests.float32_settings import setting

B, S, ROWS, COLUMNS = 4, 5, 6, 3
SHAPE = torch.Size([ROWS, COLUMNS])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense(positions: int = S) -> Outer:
    return Outer(draw(B, positions, ROWS), draw(B, positions, COLUMNS), SHAPE)


def grouped(groups: int, positions: int = S) -> Outer:
    left = draw(B * groups, positions, ROWS // groups)
    return Outer(left, draw(B * groups, positions, COLUMNS), SHAPE, groups)


def hot(positions: int = S) -> Outer:
    """Few ids, so that most samples repeat one."""
    ids = torch.randint(3, (B, positions))
    return Outer(OneHot(ids, ROWS), draw(B, positions, COLUMNS), SHAPE)


def definition(use: Outer) -> Tensor:
    left = use.left
    if isinstance(left, OneHot):
        left = torch.nn.functional.one_hot(left.ids, left.width).to(use.right.dtype)
    gradient = torch.einsum("bsr,bsc->brc", left, use.right)
    return gradient.reshape(use.samples, *use.shape)


def total(uses: list[Outer]) -> Tensor:
    return torch.stack([definition(use) for use in uses]).sum(0)


def squared_norms(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).square().sum(1)


KINDS = {
    "dense": dense,
    "one position": lambda: dense(1),
    "no position": lambda: dense(0),
    "one-hot": hot,
    "one-hot, one position": lambda: hot(1),
    "one-hot, no position": lambda: hot(0),
    "two groups": lambda: grouped(2),
    "all groups": lambda: grouped(ROWS),
    "groups, one position": lambda: grouped(3, 1),
}
JOINS = {
    "two dense": lambda: [dense(), dense(2)],
    "three dense": lambda: [dense(1), dense(1), dense(4)],
    "two one-hot": lambda: [hot(), hot(3)],
    "tied": lambda: [hot(), dense()],
    "tied, other order": lambda: [dense(), hot()],
    "tied, one position each": lambda: [hot(1), dense(1)],
    "tied twice": lambda: [hot(), dense(2), hot(1), dense(1)],
    "groups": lambda: [grouped(2), grouped(2, 1)],
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
joins = pytest.mark.parametrize("make", JOINS.values(), ids=JOINS)


@kinds
def test_per_sample(make: Callable[[], Outer]) -> None:
    use = make()
    torch.testing.assert_close(use.per_sample(), definition(use))


@kinds
def test_weighted_sum(make: Callable[[], Outer]) -> None:
    use, factors = make(), draw(B)
    expected = torch.einsum("b,b...->...", factors, definition(use))
    torch.testing.assert_close(use.weighted_sum(factors), expected)
    # The factors go to the narrower side: try the other one as well.
    if isinstance(use.left, Tensor) and use.groups == 1:
        turned = Outer(use.right, use.left, torch.Size([COLUMNS, ROWS]))
        torch.testing.assert_close(turned.weighted_sum(factors), expected.mT)


@pytest.fixture(params=[0, 256], ids=["segments", "gram"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the norm of an embedding."""
    monkeypatch.setattr(ghost, "_FEW_POSITIONS", request.param)


@pytest.mark.usefixtures("few")
@kinds
def test_ghost_norm(make: Callable[[], Outer]) -> None:
    use = make()
    torch.testing.assert_close(ghost_norms_squared([use]), squared_norms(definition(use)))


@pytest.mark.usefixtures("few")
@joins
def test_ghost_norm_of_several_uses(make: Callable[[], list[Outer]]) -> None:
    uses = make()
    torch.testing.assert_close(ghost_norms_squared(uses), squared_norms(total(uses)))


@kinds
def test_select(make: Callable[[], Outer]) -> None:
    use = make()
    use = replace(use, right=use.right.clone())
    use.right[: use.groups] = torch.inf  # all of the first sample
    keep = torch.tensor([False, True, False, True])
    selected = use.select(keep).per_sample()
    assert not selected[~keep].any()
    torch.testing.assert_close(selected[keep], definition(use)[keep])


def test_select_of_a_gradient() -> None:
    use = PerSample(torch.full((B,), torch.nan))
    assert not use.select(torch.zeros(B, dtype=torch.bool)).per_sample().any()


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_weighted_sum_of_gradients(shape: tuple[int, ...]) -> None:
    gradient, factors = draw(B, *shape), draw(B)
    result = PerSample(gradient).weighted_sum(factors)
    torch.testing.assert_close(result, torch.einsum("b,b...->...", factors, gradient))


# ------------------------------------------------------------ thresholds that small shapes miss


@pytest.mark.parametrize("positions", [2, 3, 4, 7, 16, 33])
@pytest.mark.parametrize("threshold", [2, 3, 8])
def test_symmetric_recursion(
    monkeypatch: pytest.MonkeyPatch, positions: int, threshold: int
) -> None:
    monkeypatch.setattr(gram, "_SYMMETRY_POSITIONS", threshold)
    use = dense(positions)
    torch.testing.assert_close(ghost_norms_squared([use]), squared_norms(definition(use)))


@pytest.mark.parametrize("elements", [1, S * S, 2 * S * S, 3 * S * S])
@joins
def test_gram_matrices_in_pieces(
    monkeypatch: pytest.MonkeyPatch, elements: int, make: Callable[[], list[Outer]]
) -> None:
    monkeypatch.setattr(gram, "_ELEMENTS", elements)
    uses = make()
    torch.testing.assert_close(ghost_norms_squared(uses), squared_norms(total(uses)))


def tracked(uses: list[Use], strategy: Strategy) -> Tracked:
    shared = torch.zeros(SHAPE, dtype=torch.float64)
    leaf = shared.expand(B, *SHAPE)
    return Tracked("w", shared, leaf, leaf, (0,), strategy=strategy, uses=uses)


def test_uses_that_cannot_be_joined() -> None:
    """One weight in two groupings, or a use that has no factors after all: nothing may be dropped."""
    first, second = dense(), grouped(2)
    entry = tracked([first, second], Strategy.GHOST)
    torch.testing.assert_close(entry.squared_norms(), squared_norms(total([first, second])))
    gradient = draw(B, *SHAPE)
    entry = tracked([first, PerSample(gradient)], Strategy.GHOST)
    torch.testing.assert_close(entry.squared_norms(), squared_norms(definition(first) + gradient))


def test_gradient_that_the_plan_did_not_foresee() -> None:
    """Factors are held, and then the leaf turns out to have a gradient as well."""
    use, gradient = dense(), draw(B, *SHAPE)
    entry = tracked([use], Strategy.GHOST)
    entry.leaf.grad = gradient.clone()
    entry.merge_kept_gradients()
    torch.testing.assert_close(entry.per_sample(), definition(use) + gradient)
    torch.testing.assert_close(entry.squared_norms(), squared_norms(definition(use) + gradient))


# ------------------------------------------------------------ rounding may not shrink a norm


def cancelling(distance: float) -> Outer:
    """Two nearly equal positions with opposite output gradients: the terms cancel, the sum does not."""
    left = torch.randn(B, 1, ROWS) * torch.tensor([1.0, -1.0])[:, None]
    right = torch.randn(B, 1, COLUMNS).repeat(1, 2, 1)
    right[:, 1] += distance * torch.randn(B, COLUMNS)
    return Outer(left, right, SHAPE)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("distance", [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_ghost_norm_is_not_too_small_in_float32(scale: float, distance: float) -> None:
    use = cancelling(distance)
    use = replace(use, right=scale * use.right)
    exact = replace(use, left=use.left.double(), right=use.right.double())  # type: ignore[union-attr]
    expected = squared_norms(definition(exact)).sqrt()
    found = ghost_norms_squared([use]).sqrt()
    assert (found >= 0.99 * expected).all()
    if distance >= 0.1:  # ordinary cancellation costs nothing
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.usefixtures("few")
def test_cross_term_may_cancel() -> None:
    """An embedding row and the output layer that push in opposite directions."""
    right = 1e3 * torch.randn(B, 1, COLUMNS)
    nearly = right + 1e-2 * torch.randn(B, 1, COLUMNS)
    ids = torch.zeros(B, 1, dtype=torch.long)
    row = torch.nn.functional.one_hot(ids, ROWS).float()
    uses = [Outer(OneHot(ids, ROWS), right, SHAPE), Outer(-row, nearly, SHAPE)]
    exact = (right.double() - nearly.double()).flatten(1).norm(dim=1)
    assert (ghost_norms_squared(uses).sqrt() >= 0.99 * exact).all()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("distance", [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_equal_ids_may_cancel(distance: float) -> None:
    """Every id comes twice, with nearly opposite gradients."""
    right = torch.randn(B, 4, COLUMNS)
    right = torch.cat((right, -right + distance * torch.randn(B, 4, COLUMNS)), 1)
    use = Outer(OneHot(torch.arange(4).repeat(B, 2), ROWS), right, SHAPE)
    expected = squared_norms(definition(replace(use, right=right.double()))).sqrt()
    found = ghost_norms_squared([use]).sqrt()
    assert (found >= 0.99 * expected).all()
    if distance >= 0.1:
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("materialised", [True, False])
def test_norms_allow_for_how_a_sum_rounds(
    materialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of factors that are rounded to 11 bits each are off by up to 2^-10, of which a norm is 8 times."""
    use = cancelling(1e-6)
    lengths = lengths_of([use])
    exact = torch.zeros(B)
    before = raised_to_rounding_bound(exact, lengths, [use], materialised=materialised).sqrt()
    monkeypatch.setattr(ghost, "_rounding_of_sum", lambda *_: 2.0**-10)
    after = raised_to_rounding_bound(exact, lengths, [use], materialised=materialised).sqrt()
    assert (before < after).all()
    assert (after >= lengths.products * 8 * 2.0**-10).all()


@pytest.mark.parametrize("name", ["default", "high", "medium", "backends bf16"])
def test_how_a_sum_rounds(name: str) -> None:
    """The CPU computes sums in full float32, and one-hot rows are added."""
    with setting(name), FakeTensorMode():
        on_cpu, on_cuda = (torch.empty(B, device=device) for device in ("cpu", "cuda"))
        assert ghost._rounding_of_sum(on_cpu, [cancelling(1.0)]) == 0.0
        assert ghost._rounding_of_sum(on_cuda, [cancelling(1.0)]) == product_rounding("cuda") > 0.0
        assert ghost._rounding_of_sum(on_cuda.double(), [cancelling(1.0)]) == 0.0
        assert ghost._rounding_of_sum(on_cuda, [hot()]) == 0.0


@pytest.mark.parametrize("positions", [1, 3])
def test_underflow_does_not_hide_a_norm(positions: int) -> None:
    left, right = torch.full((B, positions, ROWS), 1e18), torch.full((B, positions, COLUMNS), 1e-23)
    expected = positions * math.sqrt(ROWS * COLUMNS) * 1e-5
    assert (ghost_norms_squared([Outer(left, right, SHAPE)]).sqrt() >= expected).all()


def test_zero_stays_zero() -> None:
    for positions in (1, 3):
        use = dense(positions)
        for silent in (replace(use, right=0 * use.right), replace(use, left=0 * use.left)):  # type: ignore[operator]
            assert not ghost_norms_squared([silent]).any()


@pytest.mark.usefixtures("few")
def test_non_finite_stays_non_finite() -> None:
    for value in (torch.nan, torch.inf):
        for make in KINDS.values():
            use = make()
            if use.right.numel() == 0:
                continue
            use.right[0, 0, 0] = value
            norms = ghost_norms_squared([use])
            assert not norms[0].isfinite()
            assert norms[1:].isfinite().all()
            raised = raised_to_rounding_bound(norms, lengths_of([use]), [use], materialised=True)
            assert not raised[0].isfinite()


def test_half_precision_is_widened() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        use = dense()
        assert isinstance(use.left, Tensor)
        use = replace(use, left=use.left.to(dtype), right=100 * use.right.to(dtype))
        wide = replace(use, left=use.left.double(), right=use.right.double())  # type: ignore[union-attr]
        expected = squared_norms(definition(wide)).float()
        torch.testing.assert_close(ghost_norms_squared([use]), expected)
        factors = torch.rand(B)
        result = use.weighted_sum(factors)
        assert result.dtype is torch.float32
        exact = torch.einsum("b,brc->rc", factors.double(), definition(wide))
        absolute = replace(wide, left=wide.left.abs(), right=wide.right.abs())  # type: ignore[union-attr]
        terms = torch.einsum("b,brc->rc", factors.double(), definition(absolute))
        # A few roundings of what is summed, which may cancel; in the half types it would be hundreds of times more.
        assert ((result - exact).abs() <= 1e-6 * terms).all()


@pytest.mark.parametrize(
    "size", [1 << 12, (1 << 12) + 1, 3 * (1 << 12) - 1, 1 << 22, (1 << 22) + 5]
)
def test_norms_of_long_rows_in_float32(size: int) -> None:
    """A norm that comes out too small lets a sample contribute more than the clipping norm."""
    torch.manual_seed(0)
    gradient = torch.randn(2, size)
    exact = gradient.double().square().sum(1)
    error = (row_norms_squared(gradient).double() - exact).abs() / exact
    assert float(error.max()) < 2e-6
    assert torch.equal(row_norms_squared(gradient.view(2, 1, -1)), row_norms_squared(gradient))


@joins
def test_weighted_sum_of_several_uses(make: Callable[[], list[Outer]]) -> None:
    uses, factors = make(), torch.rand(B, dtype=torch.float64)
    expected = torch.einsum("b,brc->rc", factors, total(uses))
    torch.testing.assert_close(weighted_sum_of(uses, factors), expected)
    torch.testing.assert_close(
        weighted_sum_of([PerSample(total(uses[:1])), *uses[1:]], factors), expected
    )


@pytest.mark.parametrize("samples", [1, B])
def test_rows_are_added_to_the_sum_of_the_others(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied embedding takes no second sum, and what it is added to is nobody else's memory."""
    made: list[Tensor] = []
    weighted_sum = PerSample.weighted_sum

    def noting(self: PerSample, factors: Tensor) -> Tensor:
        made.append(weighted_sum(self, factors))
        return made[-1]

    monkeypatch.setattr(PerSample, "weighted_sum", noting)
    kept, rows = draw(samples, ROWS, COLUMNS), hot()
    assert isinstance(rows.left, OneHot)
    rows = replace(rows, left=OneHot(rows.left.ids[:samples], ROWS), right=rows.right[:samples])
    before, factors = kept.clone(), torch.ones(samples, dtype=torch.float64)
    found = weighted_sum_of([rows, PerSample(kept)], factors)
    assert found is made[0]
    assert torch.equal(kept, before)
    torch.testing.assert_close(found, (before + definition(rows)).sum(0))


@pytest.mark.parametrize("width", [1000, 4096, 4097, 20_000])
@pytest.mark.parametrize("value", [0.7, 1e-3, 3.3])
def test_norms_of_expanded_values_are_not_too_small(width: int, value: float) -> None:
    """As of a bias whose gradient is the same everywhere. The squares were too small by up to 6e-5."""
    expanded = torch.tensor([[value], [2 * value]]).expand(2, width)
    exact = expanded.double().square().sum(1)
    assert bool((row_norms_squared(expanded) >= exact * (1 - 1e-5)).all())
