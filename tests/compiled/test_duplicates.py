"""Equal expressions of a graph are computed once, if nobody can tell the difference."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from clipgrad.compiled.duplicates import merge_equal
from clipgrad.compiled.randomness import may_be_random
from tests.compiled.test_replay import draws_in_secret, graph_of

ATEN = torch.ops.aten


def merged(function: Callable[..., object], *tensors: Tensor) -> tuple[GraphModule, GraphModule]:
    """Return the traced function, and the same with equal expressions merged."""
    module = make_fx(function, tracing_mode="fake")(*tensors)
    after = copy.deepcopy(module)
    merge_equal(after)
    after.graph.lint()
    return module, after


def operations(module: GraphModule) -> Counter[object]:
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


def test_layers_that_cast_one_input_share_the_copy() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            rows = (w * x).sin()[:, None]
            query, key = (F.linear(rows, torch.full((3, 3), value)) for value in (0.5, 2.0))
            return (query.float() * key.float()).sum()

    module = graph_of(loss).module
    assert operations(module)[ATEN.sin.default] == 1
    halves = [
        node
        for node in module.graph.nodes
        if node.target is ATEN._to_copy.default
        and node.meta["val"].dtype is torch.bfloat16
        and node.args[0].target in (ATEN.sin.default, ATEN.unsqueeze.default)
    ]
    assert len(halves) == 1


@pytest.mark.parametrize(
    ("function", "operation", "count"),
    [
        (lambda x: x.sin() + x.sin(), ATEN.sin.default, 1),
        (lambda x: torch.stack([x, x]).unbind()[1] * torch.stack([x, x]).unbind()[1], ATEN.unbind.int, 1),
        (lambda x: x.view(6).exp().sum() + x.view(6).exp().sum(), ATEN.exp.default, 1),
        (lambda x: (x * 1).sum() + (x * 1.0).sum() + (x * True).sum(), ATEN.mul.Tensor, 3),
        # A longer copy is made where it is read.
        (lambda x: x.double().sum() + x.double().prod(), ATEN._to_copy.default, 2),
        (lambda x: x.bfloat16().sum() + x.bfloat16().prod(), ATEN._to_copy.default, 1),
        (
            lambda x: ATEN._to_copy(self=x, dtype=torch.float64).sum() + x.sum(),
            ATEN._to_copy.default,
            1,
        ),
        # Random numbers are drawn each time.
        (lambda x: torch.rand_like(x) + torch.rand_like(x), ATEN.rand_like.default, 2),
        (lambda x: torch.bernoulli(x) + torch.bernoulli(x), ATEN.bernoulli.default, 2),
        (
            lambda x: draws_in_secret(x) + draws_in_secret(x),
            torch.ops.clipgrad_tests.draws_in_secret.default,
            2,
        ),
        # Results are separate tensors, for example sums that a caller adds to.
        (lambda x: (x.sin(), x.sin()), ATEN.sin.default, 2),
        (lambda x: (x.sin().view(6), x.sin()), ATEN.sin.default, 2),
        # What is written to is not shared, and what was read before a write is not what is read after it.
        (lambda x: x.sin().add_(1) + x.sin(), ATEN.sin.default, 2),
        (lambda x: x.sin().view(6).add_(1).sum() + x.sin(), ATEN.sin.default, 2),
        (
            lambda x: torch.unsafe_chunk(x.sin(), 3, 1)[0].mul_(3) + x.sin(),
            ATEN.sin.default,
            2,
        ),
        # A view of what is read by stride stays a view for the compiler.
        (
            lambda x: x.sin().view(6).sum() + x.sin().as_strided((2, 2), (1, 3)).sum(),
            ATEN.sin.default,
            2,
        ),
        (lambda x: torch.zeros(2).add_(x[0, 0]) + torch.zeros(2).add_(x[1, 0]), ATEN.zeros.default, 2),
    ],
)  # fmt: skip
def test_what_is_merged(function: Callable[..., object], operation: object, count: int) -> None:
    before, after = merged(function, torch.rand(2, 3))
    assert operations(after)[operation] == count
    if not any(map(may_be_random, before.graph.nodes)):
        torch.testing.assert_close(after(torch.ones(2, 3)), before(torch.ones(2, 3)))


def test_tensors_inside_a_graph_stay_apart() -> None:
    module = make_fx(lambda x: x + x, tracing_mode="fake")(torch.ones(2))
    (node,) = module.graph.find_nodes(op="call_function", target=ATEN.add.Tensor)
    (given, _) = node.args
    with module.graph.inserting_before(node):
        almost_equal = [
            module.graph.call_function(ATEN.mul.Tensor, (given, torch.tensor([1.0, 2.0 + last])))
            for last in (0.0, 1e-6)
        ]
    for made in almost_equal:
        made.meta["val"] = given.meta["val"]
    node.args = tuple(almost_equal)
    merge_equal(module)
    assert operations(module)[ATEN.mul.Tensor] == 2


def test_operators_that_may_write_in_secret() -> None:
    def function(x: Tensor) -> Tensor:
        return x.sin() + x.sin() + torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    before, after = merged(function, torch.ones(2))
    assert operations(after) == operations(before)


def test_a_value_before_a_write_and_after() -> None:
    def function(x: Tensor) -> Tensor:
        changed = x.cos()
        before = changed.exp()
        changed.mul_(2)
        return before + changed.exp()

    _, after = merged(function, torch.rand(2, 3))
    assert operations(after)[ATEN.exp.default] == 2


def program(seed: int) -> Callable[[Tensor], list[Tensor]]:
    """A function of few kinds of operations, so that many are equal; some write in place, also through views."""

    def function(x: Tensor) -> list[Tensor]:
        choose = random.Random(seed)
        known = [x.reshape(4, 3)]
        for _ in range(30):
            a, b = choose.choice(known), choose.choice(known)
            kind = choose.randrange(9)
            if kind == 0:
                known.append(a.sin())
            elif kind == 1:
                known.append(a + b)
            elif kind == 2:
                known.append(a * 0.5)
            elif kind == 3 and a is not known[0]:
                a.mul_(0.5)
            elif kind == 4 and a is not known[0]:
                a[1:].add_(1.0)
            elif kind == 5:
                known.append(torch.stack([a, b]).unbind()[choose.randrange(2)])
            elif kind == 6:
                known.append(a.view(12).view(4, 3) if a.is_contiguous() else a.clone())
            elif kind == 7:
                known.append(torch.zeros(4, 3))
            else:
                known.append(a.flip(0))
        return [choose.choice(known).clone() for _ in range(2)] + [choose.choice(known[1:])]

    return function


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_compute_the_same(seed: int) -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    before, after = merged(program(seed), x)
    wanted, found = before(x.clone()), after(x.clone())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(program(seed)(x.clone()), wanted, equal_nan=True)


def test_random_programs_have_what_to_merge() -> None:
    fewer = [
        sum(operations(before).values()) - sum(operations(after).values())
        for before, after in (merged(program(seed), torch.randn(12)) for seed in range(20))
    ]
    assert sum(map(bool, fewer)) > 15
