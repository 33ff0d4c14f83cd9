"""The gradient of cross entropy in a compiled step is PyTorch's own, computed row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import clipped_grad
from clipgrad.compiled import cross_entropy
from clipgrad.engine.reference import clipped_sum, per_sample_gradients_by_loop
from tests.compiled.conftest import Graphs

close = torch.testing.assert_close
nll_loss_backward = torch.ops.aten.nll_loss_backward
ROWS, CLASSES = 5, 7


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_DEVICES", {"cpu"})


def arguments(**options: Any) -> list[Any]:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "gradient": torch.randn(ROWS, dtype=torch.float64),
        "log_probabilities": torch.randn(ROWS, CLASSES, dtype=torch.float64).log_softmax(1),
        "target": torch.tensor([0, 6, -100, 3, -100]),
        "weight": None,
        "reduction": 0,
        "ignore_index": -100,
        "total_weight": torch.tensor(1.0, dtype=torch.float64),
    }
    return list({**given, **options}.values())


@pytest.mark.parametrize("ignored", [-100, 3])
def test_equals_pytorch(ignored: int) -> None:
    given = arguments(ignore_index=ignored, target=torch.tensor([0, 6, ignored, 3, ignored]))
    found = cross_entropy.nll_loss_backward(*given)
    assert torch.equal(found, nll_loss_backward(*given))


def test_a_class_may_have_the_number_of_what_is_ignored() -> None:
    """In unsigned numbers of 8 bits, -100 is 156."""
    logits = torch.randn(ROWS, 200, dtype=torch.float64)
    target = torch.tensor([156, 0, 199, 156, 3], dtype=torch.uint8)
    given = arguments(log_probabilities=logits.log_softmax(1), target=target)
    assert torch.equal(cross_entropy.nll_loss_backward(*given), nll_loss_backward(*given))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_place(broken: float) -> None:
    """The compiler's own form multiplies it with zeros."""
    gradient = torch.randn(ROWS, dtype=torch.float64)
    gradient[0] = gradient[2] = broken
    given = arguments(gradient=gradient)
    found, expected = cross_entropy.nll_loss_backward(*given), nll_loss_backward(*given)
    close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert int(found.isfinite().sum()) == ROWS * CLASSES - 1


@pytest.mark.parametrize(
    "options",
    [
        {"weight": torch.rand(CLASSES, dtype=torch.float64)},
        {"reduction": 1, "gradient": torch.tensor(1.0)},
        {"log_probabilities": torch.randn(CLASSES), "target": torch.tensor(1)},
    ],
    ids=["weights", "a mean", "one row"],
)
def test_other_forms_are_left_to_the_compiler(options: dict[str, Any]) -> None:
    assert cross_entropy.nll_loss_backward(*arguments(**options)) is NotImplemented


def token_loss(p: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
    logits = (x @ p["w"]).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100)


def test_a_compiled_step_is_exact(graphs: Graphs) -> None:
    torch.manual_seed(0)
    params = {"w": torch.randn(3, CLASSES, dtype=torch.float64)}
    x, labels = torch.randn(4, 6, 3, dtype=torch.float64), torch.randint(CLASSES, (4, 6))
    labels[1, 2:] = -100
    norm = 0.3
    found = clipped_grad(token_loss, max_grad_norm=norm, compile=True)(params, x, labels)
    expected, norms = clipped_sum(
        per_sample_gradients_by_loop(token_loss, params, x, labels)[1], norm
    )
    close(found.grads["w"], expected["w"], rtol=1e-12, atol=1e-12)
    close(found.grad_norms, norms)
    (module,) = graphs.modules
    used = {str(node.target) for node in module.graph.nodes}
    assert "clipgrad.in_memory.default" in used
    assert "aten.nll_loss_backward.default" not in used
