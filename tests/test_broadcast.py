"""Parameters that an operation broadcasts: every rule is exact, or leaves them to the fallback that is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipgrad import Performance, clipped_grad
from clipgrad.engine import reference
from clipgrad.rules import Call, Outer, PerSample, Recipe, register_rule, unregister_rule
from clipgrad.rules.registry import Extent
from clipgrad.testing import Params, RuleCase
from tests.dp_tools import clipped, private
from tests.nightly import chosen
from tests.test_rules import CASES, double

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own remarks on odd shapes
SAMPLES = 3
STRATEGIES = ("kept", "ghost")
# PyTorch's own sequence operations read past weights of the wrong shape; those of their cells do not.
UNSAFE = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
RULES = sorted({case.rule for case in CASES} - UNSAFE)


def narrowed(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes that broadcast to a shape, or by one more axis: axes of length one, leading axes left out."""
    for ones in product((False, True), repeat=len(shape)):
        some = tuple(1 if one else size for one, size in zip(ones, shape, strict=True))
        yield from (some[start:] for start in range(len(shape) + 1))
    yield (1, *shape)
    yield (*shape, 1)


def variants(case: RuleCase) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A parameter and another shape for it."""
    with torch.random.fork_rng():
        shapes = {name: tuple(value.shape) for name, value in case.params().items()}
    for name, shape in shapes.items():
        yield from ((name, other) for other in dict.fromkeys(narrowed(shape)) if other != shape)


def drawn(case: RuleCase, name: str, shape: tuple[int, ...]) -> tuple[Params, tuple[Tensor, ...]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params, batch = case.params(), case.batch(SAMPLES)
        params[name] = torch.randn(shape, dtype=torch.float64)
    return params, batch


def assert_exact(
    case: RuleCase, params: Params, batch: tuple[Tensor, ...], gradients: Params
) -> None:
    sums, norms = reference.clipped_sum(gradients, 1.0)
    for strategy in STRATEGIES:
        result = clipped_grad(
            case.loss, max_grad_norm=1.0, performance=Performance(strategy=strategy)
        )(params, *batch)
        torch.testing.assert_close(result.grad_norms, norms, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dict(result.grads), sums, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", chosen(RULES, {*RULES[::2]} - {"einsum"}))  # it takes seconds
def test_every_rule(rule: str) -> None:
    """Wherever PyTorch runs the operation on single samples, the result is that of the loop."""
    legal = 0
    # Fused attention on the CPU reads and writes past operands of shapes that it does not expect.
    with sdpa_kernel(SDPBackend.MATH):
        for case in CASES:
            if case.rule != rule:
                continue
            for name, shape in variants(case):
                params, batch = drawn(case, name, shape)
                try:
                    _, gradients = reference.per_sample_gradients_by_loop(case.loss, params, *batch)
                except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
                    continue  # not a shape that PyTorch takes
                legal += 1
                assert_exact(case, params, batch, gradients)
    assert legal > 0


T, INPUTS, OUTPUTS = 4, 3, 5
BIASES = [(), (1,), (1, 1), (T, 1), (1, OUTPUTS), (T, OUTPUTS), (1, 1, OUTPUTS), (OUTPUTS,)]


@pytest.mark.parametrize("positions", [(), (T,)])
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize("operation", ["linear", "addmm"])
def test_biases(operation: str, bias: tuple[int, ...], positions: tuple[int, ...]) -> None:
    def loss(p: Params, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if operation == "linear":
            y = F.linear(rows, p["w"].t(), p["b"])
        else:
            y = torch.addmm(p["b"], rows, p["w"], beta=0.5, alpha=2)
        return (y.sin() * torch.arange(y.numel()).view_as(y)).sum()

    torch.manual_seed(0)
    params = {
        "w": torch.randn(INPUTS, OUTPUTS, dtype=torch.float64),
        "b": torch.randn(bias, dtype=torch.float64),
    }
    batch = torch.randn(SAMPLES, *positions, INPUTS, dtype=torch.float64)
    case = RuleCase(operation, "bias", loss, lambda: params, lambda size: (batch,))
    try:
        _, gradients = reference.per_sample_gradients_by_loop(loss, params, batch)
    except RuntimeError:
        assert len(bias) == 3 or (positions == () and bias[:1] == (T,))  # PyTorch refuses these
        return
    assert_exact(case, params, (batch,), gradients)


def test_a_bias_of_one_element_in_an_optimizer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    model = Layer()
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer = private(model)
    optimizer.backward(x)
    torch.testing.assert_close(optimizer.clipped_sums, clipped(model, x)[0], rtol=1e-9, atol=1e-9)
    optimizer.step()


def as_gradient(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    """A rule that forgets that its weight may be broadcast."""
    data = call.batched(x)
    return call.finish(
        2 * data * call.shared(weight),
        Recipe(weight, lambda g: PerSample((2 * g * data).sum(1))),
        saved=(data,),
    )


def as_factors(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    """The same with factors, which claim the shape of the output."""
    data = call.batched(x)

    def make(g: Tensor) -> Outer:
        return Outer(2 * g * data, torch.ones_like(g[..., :1]), torch.Size((3, 1)))

    return call.finish(2 * data * call.shared(weight), Recipe(weight, make, Extent(1, 3, 1)))


def too_few_samples(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    data = call.batched(x)
    recipe = Recipe(weight, lambda g: PerSample((2 * g * data).sum((0, 1), keepdim=True)[0]))
    return call.finish(2 * data * call.shared(weight), recipe)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("rule", "shape"),
    [(as_gradient, (1,)), (as_gradient, (1, 3)), (as_factors, (1,)), (too_few_samples, (3,))],
)
def test_a_rule_that_broadcasts_raises(rule: object, shape: tuple[int, ...], strategy: str) -> None:
    def loss(p: Params, x: Tensor) -> Tensor:
        return double(x, p["w"]).square().sum()

    gradient = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))
    register_rule(double, name="double")(rule)  # type: ignore[type-var]
    try:
        with pytest.raises(RuntimeError, match=r"rule 'double' gave parameter 'w'.*shape.*Decline"):
            gradient({"w": torch.ones(shape)}, torch.ones(2, 3))
    finally:
        unregister_rule(double)
