"""Test that checkpointed regions run twice, are exact, and keep only their inputs between the two runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import clipgrad.engine.recompute as recompute
from clipgrad import Performance, clipped_grad
from clipgrad.errors import NotPerSampleError
from tests.compiled.conftest import Graphs, graphs  # noqa: F401
from tests.dp_tools import clipped, private, trained
from tests.loss_graph.test_lifted import OldStyle
from tests.nightly import chosen, every, picked

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def again(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


class Block(nn.Module):
    """This block has attention, a layer with an adapter, and an operation that a test adds."""

    def __init__(self, inner: Callable[[Block, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(4), nn.Linear(4, 12)
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(query, key, value)
        hidden = F.gelu(self.up(x) + x @ self.a.t() @ self.b.t())
        x = x + self.down(hidden)
        return x if self.inner is None else self.inner(self, x)


class Model(nn.Module):
    """This model has two blocks between an embedding table and a head that uses the same table."""

    def __init__(
        self,
        inner: Callable[[Block, Tensor], Tensor] | None = None,
        around: Callable[[Block, Tensor], Tensor] = again,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block(inner) for _ in range(2))
        self.around = around
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = self.around(block, x)  # type: ignore[arg-type]
        return F.linear(x, self.table.weight)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def batch(size: int = 5) -> Tensor:
    return torch.randint(0, 7, (size, 6), generator=torch.Generator().manual_seed(1))


def tied(m: Model) -> Model:
    m.blocks[1].down.weight = m.blocks[0].down.weight
    m.blocks[0].norm.weight = m.blocks[1].norm.bias
    return m


def frozen(m: Model) -> Model:
    m.requires_grad_(False)
    for block in m.blocks:
        block.a.requires_grad_(True)
        block.b.requires_grad_(True)
    return m


def normed(m: Model) -> Model:
    for block in m.blocks:
        parametrizations.weight_norm(block.up)
    return m


def nested(block: Block, x: Tensor) -> Tensor:
    return again(lambda h: again(block, h * 2) + again(block.norm, h), x)  # type: ignore[no-any-return]


def head_inside(m: Model) -> Model:
    """Use the table in a region, before it and after it."""
    m.around = (
        lambda block, x: again(  # type: ignore[assignment]
            lambda h: block(h) + F.linear(h, m.table.weight)[..., :4], x
        )
    )
    return m


def several(block: Block, x: Tensor) -> Tensor:
    """Return outputs of many kinds: used twice, unused, integers, an expression of a parameter, and an input."""

    def region(h: Tensor) -> tuple[Tensor, ...]:
        out = block(h)
        return out, out.sin(), out.argmax(-1), block.a.t() * 2, h

    out, _, index, weight, same = again(region, x)
    return out * out.cos() + F.one_hot(index, 4) + (same @ weight)[..., :1]  # type: ignore[no-any-return]


def in_place_after(block: Block, x: Tensor) -> Tensor:
    out = again(block, x)
    out += x
    return out  # type: ignore[no-any-return]


def without_grad(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = block.up(x).sum()
    return x * scale


MODELS: dict[str, Callable[[], Model]] = {
    "plain": Model,
    "tied": lambda: tied(Model()),
    "frozen base": lambda: frozen(Model()),
    "weight norm": lambda: normed(Model()),
    "nested": lambda: Model(around=nested),
    "head inside": lambda: head_inside(Model()),
    "several outputs": lambda: Model(around=several),
    "in place after": lambda: Model(around=in_place_after),
    "custom function": lambda: Model(lambda b, x: x + OldStyle.apply(b.up(x))[..., :4]),  # type: ignore[no-untyped-call]
    "vmap inside": lambda: Model(lambda b, x: torch.vmap(lambda h: h * h.sum())(x)),
    "no grad inside": lambda: Model(without_grad),
    "parameters alone": lambda: Model(around=lambda b, x: b(x) @ again(lambda: (b.a.t() @ b.a).sin())),
    "reentrant": lambda: Model(around=lambda b, x: checkpoint(b, x, use_reentrant=True)),  # type: ignore[arg-type, return-value]
    "fallback": lambda: Model(lambda b, x: x * torch.linalg.vector_norm(b.up.weight * x.sum())),
}  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by one entry at each run of a region in a backward pass."""
    found: list[str] = []
    run = recompute._Region.again
    monkeypatch.setattr(
        recompute._Region, "again", lambda *args: (found.append("again"), run(*args))[1]
    )
    return found


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "ghost": {"performance": Performance(strategy="ghost"), "microbatch_size": 2},
}
CASES = [(name, "as it is") for name in MODELS]
CASES += [
    (name, "ghost") for name in ("tied", "frozen base", "weight norm", "nested", "several outputs")
]


@pytest.mark.parametrize(
    ("name", "way"),
    picked(
        CASES,
        {
            "vmap inside-as it is",
            "weight norm-as it is",
            "reentrant-as it is",
            "frozen base-ghost",
            "several outputs-ghost",
        },
    ),
)
def test_equals_the_loop(name: str, way: str, runs: list[str]) -> None:
    model, options = MODELS[name](), WAYS[way]
    optimizer = private(model, loss, max_grad_norm=0.5, **options)
    optimizer.backward(batch())
    sums, norms = clipped(model, batch(), loss=loss, max_grad_norm=0.5)
    assert len(set(norms.tolist())) > 1
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)
    torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms, rtol=0, atol=1e-9)
    assert bool(runs) == (name != "parameters alone")


def test_inside_of_a_transform_it_runs_once(runs: list[str]) -> None:
    """Such a region runs once; PyTorch itself cannot run it."""

    def inside(block: Block, x: Tensor) -> Tensor:
        return torch.vmap(lambda h: again(block.down, again(block.up, h)))(x)

    def without(block: Block, x: Tensor) -> Tensor:
        return block.down(block.up(x))  # type: ignore[no-any-return]

    optimizer = private(Model(around=inside), loss, max_grad_norm=0.5)
    optimizer.backward(batch())
    sums, _ = clipped(Model(around=without), batch(), loss=loss, max_grad_norm=0.5)
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)
    assert not runs


@pytest.mark.parametrize(
    "name",
    chosen(["tied", "frozen base", "nested", "several outputs", "fallback"], {"tied"}),
)
def test_compiled(name: str, graphs: Graphs, runs: list[str]) -> None:  # noqa: F811
    model = MODELS[name]()
    optimizer = private(model, loss, max_grad_norm=0.5, compile=True)
    optimizer.backward(batch())
    sums, _ = clipped(model, batch(), loss=loss, max_grad_norm=0.5)
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)
    assert runs
    assert len(graphs) == 1


def functional(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda params, ids: loss(partial(functional_call, model, params), ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("compile", every(2, [False, True]))
def test_random_numbers_are_drawn_once(
    compile: bool,
    graphs: Graphs,  # noqa: F811
    runs: list[str],
) -> None:
    """The second run draws the masks of the first, and later layers draw the same random numbers as without it."""

    def dropped(block: Block, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)

    found = []
    for around in (again, lambda block, x: block(x)):
        model = Model(dropped, around)
        gradient = clipped_grad(functional(model), max_grad_norm=0.5, compile=compile)
        for _ in range(2):  # Python, which is refused at first, draws too
            torch.manual_seed(3)
            result = gradient(trained(model), batch())
        found.append((result.grads, result.grad_norms, torch.rand(1)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    assert bool(runs)


def test_autocast_holds_in_the_second_run() -> None:
    found = []
    for around in (again, lambda block, x: block(x)):
        model = Model(around=around).float()

        def under_autocast(m: nn.Module, ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(m, ids).float()

        optimizer = private(model, under_autocast, max_grad_norm=0.5)
        optimizer.backward(batch())
        found.append(optimizer.clipped_sums)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_a_region_that_changes_what_it_was_given() -> None:
    def changes(block: Block, x: Tensor) -> Tensor:
        return again(lambda h: block(h.mul_(2.0)), x * 1.0)  # type: ignore[no-any-return]

    with pytest.raises(NotPerSampleError, match="in place"):
        private(Model(around=changes), loss).backward(batch())


def test_a_sample_that_is_not_finite() -> None:
    model = Model()

    def scaled(m: nn.Module, ids: Tensor, scale: Tensor) -> Tensor:
        return loss(m, ids) * scale.sum()

    ids, scale = batch(), torch.ones(5, dtype=torch.float64)
    scale[2] = float("inf")
    optimizer = private(model, scaled, max_grad_norm=0.5)
    optimizer.backward(ids, scale)
    keep = torch.tensor([0, 1, 3, 4])
    sums, _ = clipped(model, ids[keep], scale[keep], loss=scaled, max_grad_norm=0.5)
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)
