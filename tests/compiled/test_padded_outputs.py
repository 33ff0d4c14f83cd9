"""The gradient of a padded output is computed on all columns where each element depends on its own column only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from clipgrad import clipped_grad
from clipgrad.compiled import cross_entropy, padded_outputs
from clipgrad.kernels import half_products
from clipgrad.rules import linear as linear_module
from tests.compiled.conftest import Graphs, norms_of_equal_sums
from tests.nightly import every

close = torch.testing.assert_close
Params = dict[str, Tensor]
CLASSES = 7  # odd, so that rows in float64 have no alignment


@pytest.fixture(autouse=True)
def padded_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded_outputs, "_DEVICES", {"cpu"})
    monkeypatch.setattr(cross_entropy, "_DEVICES", {"cpu"})
    monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)
    monkeypatch.setattr(linear_module, "_WIDE_OUTPUT", 2)


def logits_of(p: Params, x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"])


def tokens(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(p, x).flatten(0, 1), y.flatten(), ignore_index=-100)


def scaled(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(-2.0 * logits_of(p, x).flatten(0, 1) / 3.0, y.flatten())


def two_targets(p: Params, x: Tensor, y: Tensor) -> Tensor:
    logarithms = logits_of(p, x).flatten(0, 1).log_softmax(-1)
    return F.nll_loss(logarithms, y.flatten()) + 2 * F.nll_loss(logarithms, y.flatten().flip(0))


def capped(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """As Gemma caps its logits."""
    logits = 5.0 * torch.tanh(logits_of(p, x) / 5.0)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def two_heads(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return tokens(p, x, y) + scaled(p, x.square(), y)


def log_softmax(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return (logits_of(p, x).log_softmax(-1) * logits_of(p, x).detach()).sum()


def with_penalty(p: Params, x: Tensor, y: Tensor) -> Tensor:
    logits = 2.0 * logits_of(p, x)
    value = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return value + logits.logsumexp(-1).square().mean()


def over_positions(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return logits_of(p, x).log_softmax(1).square().sum()


def squares(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return (logits_of(p, x) * x.sum(-1, keepdim=True)).sum()


def of_columns(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of a column depends on the column before."""
    logits = logits_of(p, x)
    return (logits[..., 1:] * logits[..., :-1]).sum()


def some_columns(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(p, x)[..., :5].flatten(0, 1), y.flatten() % 5)


def cumulated(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return logits_of(p, x).cumsum(-1).square().sum()


def label_smoothing(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(p, x).flatten(0, 1), y.flatten().abs(), label_smoothing=0.1)


GAIN = torch.randn(CLASSES, 1, dtype=torch.float64)


def viewed_column(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """What is one column in memory has the classes in rows."""
    return F.cross_entropy((logits_of(p, x) * GAIN.view(-1)).flatten(0, 1), y.flatten())


def viewed_columns_of_samples(p: Params, x: Tensor, y: Tensor) -> Tensor:
    gains = x.flatten(1).sum(1)[:, None, None] * GAIN
    logits = logits_of(p, x) * gains.reshape(-1, 1, CLASSES)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def but_the_last(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """The end of the slice is counted from the end of few columns."""
    return F.linear(x, p["w"][:2])[..., :-1].square().sum()


WIDENED: dict[str, Callable[..., Tensor]] = {
    "tokens": tokens, "scaled": scaled, "two_heads": two_heads, "capped": capped,
    "with_penalty": with_penalty,
}  # fmt: skip
OTHERS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        log_softmax, over_positions, squares, of_columns, some_columns, cumulated, label_smoothing,
        two_targets, viewed_column, viewed_columns_of_samples, but_the_last,
    )
}  # fmt: skip


def made() -> tuple[Params, Tensor, Tensor]:
    params = {
        "w": torch.randn(CLASSES, 3, dtype=torch.float64),
        "b": torch.randn(CLASSES, dtype=torch.float64),
    }
    x, y = torch.randn(4, 6, 3, dtype=torch.float64), torch.randint(CLASSES, (4, 6))
    return params, x, y


def clipped_in_graph(loss: Callable[..., Tensor], *given: Any) -> Any:
    """Batches of one size, as on a GPU."""
    return clipped_grad(loss, max_grad_norm=0.3, compile=True, microbatch_size=4)(*given)


def pads_left(graphs: Graphs) -> int:
    """The paddings that the compiler would write."""
    (module,) = graphs.modules
    targets = [str(node.target) for node in module.graph.nodes]
    return targets.count("aten.slice_backward.default")


@pytest.mark.parametrize("name", every(4, [*WIDENED, *OTHERS]))
def test_exact(name: str, graphs: Graphs) -> None:
    loss = {**WIDENED, **OTHERS}[name]
    params, x, y = made()
    if name == "tokens":
        y[1, 2:] = -100
    found = clipped_in_graph(loss, params, x, y)
    close(found.grad_norms, norms_of_equal_sums(found, loss, 0.3, params, x, y))
    if name in WIDENED:
        assert not pads_left(graphs)


def some_tokens(p: Params, x: Tensor, y: Tensor) -> Tensor:
    logits = logits_of(p, x).flatten(0, 1)
    of_tokens = F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape)
    return of_tokens[:, :-1].mean() + of_tokens[:, :3].sum()


def test_two_graphs_serve_all_lengths(graphs: Graphs) -> None:
    params, _, _ = made()
    gradient = clipped_grad(some_tokens, max_grad_norm=0.3, compile=True, microbatch_size=4)
    for length in (12, 9, 11, 5, 8):
        x = torch.randn(4, length, 3, dtype=torch.float64)
        y = torch.randint(CLASSES, (4, length))
        found = gradient(params, x, y)
        norms_of_equal_sums(found, some_tokens, 0.3, params, x, y)
    assert len(graphs) == 2
    for module in graphs.modules:
        found_lt = module.graph.find_nodes(op="call_function", target=torch.ops.aten.lt.Scalar)
        assert found_lt, "the logits were not widened"


def test_a_softmax_in_half_precision_is_left_to_the_compiler(graphs: Graphs) -> None:
    """PyTorch computes its sums in float32."""
    params, x, y = made()
    params = {name: value.bfloat16() for name, value in params.items()}
    clipped_in_graph(tokens, params, x.bfloat16(), y)
    assert pads_left(graphs) == 1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e300])
def test_a_sample_that_is_not_finite(broken: float, graphs: Graphs) -> None:
    """Padding stays zero, whatever its columns of logits would give."""
    params, x, y = made()
    x[2, 1, 0] = broken
    found = clipped_in_graph(tokens, params, x, y)
    keep = [0, 1, 3]
    assert found.num_nonfinite == 1
    norms_of_equal_sums(found, tokens, 0.3, params, x[keep], y[keep])


def test_logits_far_below_zero(graphs: Graphs) -> None:
    """The padding's own logit is 0, and its exponential would be infinite."""
    params, x, y = made()
    params["b"] -= 2000.0
    found = clipped_in_graph(tokens, params, x, y)
    assert not pads_left(graphs)
    close(found.grad_norms, norms_of_equal_sums(found, tokens, 0.3, params, x, y))


def padded(gradient: Tensor) -> Tensor:
    return torch.ops.aten.slice_backward(gradient, [5, 8], 1, 0, 7, 1)


def plain(wide: Tensor, row: Tensor) -> Tensor:
    return padded(wide[:, :7].clone() * row)


def changed_before(wide: Tensor, row: Tensor) -> Tensor:
    """The view reads what was added, and the wide values have it not."""
    narrow = wide[:, :7].clone()
    view = narrow.view(5, 7)
    narrow.add_(1.0)
    return padded(view * row)


def changed_after(wide: Tensor, row: Tensor) -> Tensor:
    values = wide[:, :7] * row
    wide.zero_()
    return padded(values)


def row_changed_after(wide: Tensor, row: Tensor) -> Tensor:
    values = wide[:, :7] * torch.ops.aten._unsafe_view(row, [5, 1])
    row.zero_()
    return padded(values)


@pytest.mark.parametrize(
    ("function", "widens"),
    [(plain, True), (changed_before, False), (changed_after, False), (row_changed_after, False)],
)
def test_what_is_written_in_place_is_not_read_again(
    function: Callable[..., Tensor], widens: bool
) -> None:
    wide, row = torch.randn(5, 8), torch.randn(5, 1)
    module = make_fx(function, tracing_mode="fake")(wide, row)
    expected = function(wide.clone(), row.clone())
    padded_outputs.pad_last(module)
    targets = [str(node.target) for node in module.graph.nodes]
    assert ("aten.slice_backward.default" not in targets) == widens
    close(module(wide, row), expected, rtol=0, atol=0)
