"""Test losses that return metrics beside their value, which ``backward`` returns per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad import PrivacyPlan, clipped_grad, poisson_loader
from clipgrad.errors import NotPerSampleError
from clipgrad.result import NotPrivate
from clipgrad.sampling import PaddedBatch
from tests.dp_tools import clipped, data, mlp, private, squared

Metrics = dict[str, Tensor]


def with_metrics(model: nn.Module, x: Tensor) -> tuple[Tensor, Metrics]:
    y = model(x)
    return y.square().mean(), {"largest": y.max(), "output": y[0].detach()}


def expected(model: nn.Module, x: Tensor) -> Metrics:
    with torch.no_grad():
        y = model(x)
    return {"largest": y.amax(1), "output": y}


def assert_metrics(found: Any, model: nn.Module, x: Tensor) -> None:
    assert isinstance(found, NotPrivate)
    loss, metrics = found
    torch.testing.assert_close(metrics, expected(model, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(loss, model(x).square().mean(1).mean().detach(), rtol=0, atol=1e-9)
    assert not any(leaf.requires_grad for leaf in (loss, *metrics.values()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"microbatch_size": 2},
        pytest.param({"compile": True, "microbatch_size": 3}, marks=pytest.mark.nightly),
    ],
    ids=["whole", "microbatches", "compiled"],
)
def test_metrics_of_each_sample_and_the_same_sums(options: dict[str, Any]) -> None:
    model, x = mlp(), data(5)
    optimizer = private(model, with_metrics, **options)
    found = optimizer.backward(x)
    assert_metrics(found, model, x)
    sums, _ = clipped(model, x)
    torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)


def test_a_loss_without_metrics_gives_its_mean() -> None:
    assert isinstance(private(mlp()).backward(data()), Tensor)
    assert isinstance(private(mlp()).backward(data()[:0]), Tensor)


def test_padding_has_no_metrics() -> None:
    model, x = mlp(), data(5)
    is_padding = torch.tensor([False, True, False, True, False])
    found = private(model, with_metrics).backward(x, is_padding=is_padding)
    assert_metrics(found, model, x[~is_padding])
    found = private(model, with_metrics).backward(PaddedBatch((x,), is_padding))
    assert_metrics(found, model, x[~is_padding])


def reads_a_value(model: nn.Module, x: Tensor) -> tuple[Tensor, Metrics]:
    """Return what ``with_metrics`` returns; only PyTorch's graph of it, where nothing is read, can be batched."""
    if not torch.compiler.is_compiling():
        bool((x == 0).all())
    return with_metrics(model, x)


@pytest.mark.parametrize("loss", [with_metrics, reads_a_value])
def test_an_empty_batch_has_metrics_of_no_samples_also_as_the_first_one(loss: Any) -> None:
    model, x = mlp(), data(5)
    optimizer = private(model, loss)
    state = torch.get_rng_state()
    first = optimizer.backward(x[:0])
    assert torch.equal(torch.get_rng_state(), state)
    optimizer.backward(x)
    for found in (first, optimizer.backward(x[:0])):
        assert found.loss.isnan()
        assert {name: tuple(leaf.shape) for name, leaf in found.metrics.items()} == {
            "largest": (0,),
            "output": (0, 2),
        }


def test_the_first_empty_batch_of_a_loss_that_takes_no_zeros() -> None:
    def picky(model: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("this loss takes no zeros")

    optimizer = private(mlp(), picky, noise_multiplier=1.0)
    assert optimizer.backward(data()[:0]).isnan()
    optimizer.step()


def with_inverse(model: nn.Module, x: Tensor) -> tuple[Tensor, Metrics]:
    """Return loss and metrics; zeros have no inverse."""
    inverse = torch.linalg.inv(torch.diag(x[0])).diagonal()[None]
    return with_metrics(model, inverse)


def test_metrics_that_zeros_do_not_show_are_left_out_with_a_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer, x = private(mlp(), with_inverse), data(5)
    assert optimizer.backward(x[:0]).isnan()
    (message,) = (record.getMessage() for record in caplog.records)
    assert "LinAlgError" in message
    assert "So backward returns the loss alone" in message
    assert_metrics(optimizer.backward(x), optimizer.model, 1 / x)
    assert optimizer.backward(x[:0]).metrics["output"].shape == (0, 2)


def test_auxiliary_output_that_zeros_do_not_show_is_refused_with_a_remedy() -> None:
    def loss(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.linalg.inv(torch.diag(x[0])) @ weight
        return y.square().mean(), y

    weight, x = torch.ones(4, 2, dtype=torch.float64), data(5)
    gradient = clipped_grad(loss, max_grad_norm=1.0, has_aux=True)
    with pytest.raises(ValueError, match=r"LinAlgError.* on a row of zeros.*Let the loss accept"):
        gradient(weight, x[:0])
    assert gradient(weight, x).aux.shape == (5, 4, 2)
    assert gradient(weight, x[:0]).aux.shape == (0, 4, 2)


def test_metrics_in_a_loop_of_poisson_batches() -> None:
    """Batches of one or two samples on average, so some are empty; accuracy is that of the ordinary forward pass."""
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(2, (40,))
    model = mlp()

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Metrics]:
        logits = model(x)
        correct = (logits.argmax(1) == y).double()
        return nn.functional.cross_entropy(logits, y), {"correct": correct.mean()}

    plan = PrivacyPlan(
        num_samples=40, expected_batch_size=1.5, steps=30, delta=1e-3, noise_multiplier=1.0
    )
    optimizer = private(
        model, loss_fn, plan=plan, max_grad_norm=None, noise_multiplier=None, expected_batch_size=None
    )  # fmt: skip
    sizes = []
    for inputs, labels in poisson_loader(torch.utils.data.TensorDataset(x, y), plan=plan):
        with torch.no_grad():
            right = (model(inputs).argmax(1) == labels).double()
        loss, metrics = optimizer.backward(inputs, labels)
        assert torch.equal(metrics["correct"], right)
        assert loss.isnan() == (len(inputs) == 0)
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(len(inputs))
    assert len(sizes) == 30


class Accuracy(nn.Module):
    """Counts in Python within the loss, as loops do that keep a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = mlp(), []


PYTHON_METRICS = {
    "a number returned": (
        lambda m, x: (squared(m.layer, x), 0.5),
        "float.*metrics that are tensors",
    ),
    "a name returned": (
        lambda m, x: (squared(m.layer, x), {"what": "mean", "of": x.mean()}),
        "str.*metrics that are tensors",
    ),
    "item returned": (
        lambda m, x: (squared(m.layer, x), {"mean": x.mean().item()}),
        r"item\(\).*\(loss, metrics\)",
    ),
    "three values returned": (
        lambda m, x: (squared(m.layer, x), x.mean(), x.sum()),
        r"got tuple.*return \(loss, metrics\)",
    ),
    "a dictionary returned": (
        lambda m, x: {"loss": squared(m.layer, x)},
        r"got dict.*return \(loss, metrics\)",
    ),
}


@pytest.mark.parametrize("name", PYTHON_METRICS)
def test_python_metrics_end_in_a_message_that_says_so(name: str) -> None:
    loss, message = PYTHON_METRICS[name]
    for size in (5, 0):
        with pytest.raises(NotPerSampleError, match=message):
            private(Accuracy(), loss).backward(data()[:size])


def test_a_metric_kept_in_the_loss_names_the_remedy() -> None:
    model = Accuracy()

    def keeps(model: Any, x: Tensor) -> Tensor:
        loss = squared(model.layer, x)
        model.seen.append(loss.detach())
        return loss

    private(model, keeps).backward(data())
    with pytest.raises(
        NotPerSampleError, match=r"Return what you want to log as \(loss, metrics\)"
    ):
        float(model.seen[0])
