"""Scores: the recorder against the definition, and that neither score disturbs a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, SeededNoise
from clipgrad.audit import StepRecorder, canary_losses
from tests.audit_tools import Setting, train
from tests.dp_tools import assert_same, data, mlp, private, sgd, squared, values
from tests.oracle import per_sample_gradients

M = 7


def canaries(m: int = M) -> Tensor:
    """Gradients shorter and longer than the clipping norm of one."""
    return data(m, seed=3) * torch.logspace(-2, 1, m, dtype=torch.float64)[:, None]


def step(optimizer: DPOptimizer, recorder: StepRecorder | None = None, seed: int = 1) -> None:
    optimizer.backward(data(seed=seed))
    if recorder is None:
        optimizer.step()
    else:
        with recorder:
            optimizer.step()
    optimizer.zero_grad()


def along(
    model: nn.Module, moved: dict[str, Tensor], batch: Tensor, bound: float = 1.0
) -> list[float]:
    """Scalar products of ``moved`` with the clipped gradients, one after another."""
    gradients = per_sample_gradients(model, squared, (batch,))
    found = []
    for i in range(len(batch)):
        norm = torch.cat([g[i].flatten() for g in gradients.values()]).norm()
        product = sum(float((g[i] * moved[name]).sum()) for name, g in gradients.items())
        found.append(product * min(1.0, bound / float(norm)))
    return found


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("observe", ["parameters", "gradients"])
def test_products_are_the_definition(observe: Any, chunk_size: int) -> None:
    model = mlp()
    generator = torch.Generator().manual_seed(0)
    optimizer = private(
        model,
        inner=sgd(model, lr=0.5),
        noise_multiplier=0.1,
        expected_batch_size=4,
        noise=SeededNoise(generator),
    )
    recorder = StepRecorder(optimizer, canaries(), observe=observe, chunk_size=chunk_size)
    expected = []
    for number in range(3):
        before = mlp()
        before.load_state_dict(model.state_dict())
        step(optimizer, recorder, seed=number)
        moved = {name: p - values(model)[name] for name, p in values(before).items()}
        if observe == "gradients":  # plain SGD
            moved = {name: change / 0.5 for name, change in moved.items()}
        expected.append(along(before, moved, canaries()))
    reference = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(recorder.products, reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(recorder.scores(), reference.sum(0))


def test_a_dirac_canary_is_scored_by_its_own_row() -> None:
    setting = Setting(m=40, noise_multiplier=1.0, sample_rate=0.5, steps=4)
    rows, x = (samples[:40] for samples in setting.samples())
    best, _, recorder = train(setting, watch=lambda optimizer: StepRecorder(optimizer, rows, x))
    torch.testing.assert_close(recorder.scores(), torch.tensor(best).double(), atol=1e-5, rtol=1e-5)


def test_groups_are_scored_as_one() -> None:
    model = mlp()
    optimizer = private(model, max_grad_norm={"0": 0.3, "2": 0.4})
    recorder = StepRecorder(optimizer, canaries())
    before = values(model)
    twin = mlp()
    step(optimizer, recorder)
    moved = {name: p - values(model)[name] for name, p in before.items()}
    expected = torch.tensor([along(twin, moved, canaries(), 0.5)], dtype=torch.float64)
    torch.testing.assert_close(recorder.products, expected)


def test_frozen_parameters_take_no_part() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = private(model, inner=torch.optim.SGD(model[2].parameters(), lr=1.0))
    recorder = StepRecorder(optimizer, canaries())
    twin = mlp()
    before = values(model)
    step(optimizer, recorder)
    moved = {name: p - values(model)[name] for name, p in before.items()}
    gradients = per_sample_gradients(twin, squared, (canaries(),))
    for i in range(M):
        own = {name: g[i] for name, g in gradients.items() if name.startswith("2.")}
        norm = torch.cat([g.flatten() for g in own.values()]).norm()
        product = sum((g * moved[name]).sum() for name, g in own.items())
        torch.testing.assert_close(recorder.products[0, i], product * (1 / norm).clamp(max=1.0))


def test_a_canary_without_a_finite_gradient_scores_nothing() -> None:
    bad = canaries()
    bad[2] = float("nan")
    bad[4] = float("inf")
    optimizer = private(mlp())
    recorder = StepRecorder(optimizer, bad)
    step(optimizer, recorder)
    zeros = recorder.scores() == 0.0
    assert zeros.tolist() == [False, False, True, False, True, False, False]


def with_dropout() -> nn.Sequential:
    model = mlp()
    model.insert(1, nn.Dropout(0.5))
    return model


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: sgd(model, lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("observe", ["parameters", "gradients"])
def test_scores_do_not_change_the_training(name: str, observe: Any) -> None:
    def run(audited: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = with_dropout()
        model[2].eval()  # a flag of its own
        generator = torch.Generator().manual_seed(0)
        optimizer = private(
            model, inner=OPTIMIZERS[name](model), noise_multiplier=0.1, noise=SeededNoise(generator)
        )
        recorder = StepRecorder(optimizer, canaries(), observe=observe) if audited else None
        for number in range(3):
            if audited:
                canary_losses(model, squared, canaries())
            step(optimizer, recorder, seed=number)
        assert [module.training for module in model] == [True, True, False, True]
        return {**values(model), "next": torch.rand(3)}

    assert_same(run(True), run(False))


def test_a_failed_step_is_not_recorded() -> None:
    optimizer = private(mlp())
    recorder = StepRecorder(optimizer, canaries())
    with pytest.raises(RuntimeError, match="no backward"), recorder:
        optimizer.step()
    assert recorder.products.shape == (0, M)
    assert recorder.scores().tolist() == [0.0] * M


def test_gradients_that_are_gone_are_missed() -> None:
    optimizer = private(mlp())
    recorder = StepRecorder(optimizer, canaries(), observe="gradients")
    optimizer.backward(data())

    def step_and_forget() -> None:
        with recorder:
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(ValueError, match="zero_grad\\(\\) outside"):
        step_and_forget()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "canaries must be tensors"),
        ((torch.zeros(3, 4), torch.zeros(2, 4)), {}, "first axes"),
        ((torch.zeros(0, 4),), {}, "positive length"),
        ((torch.tensor(1.0),), {}, "canaries must be tensors"),
        (([1.0, 2.0],), {}, "canaries must be tensors"),
        ((canaries(),), {"observe": "losses"}, "observe must be"),
        ((canaries(),), {"chunk_size": 0}, "chunk_size must be"),
    ],
)
def test_recorder_refuses(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepRecorder(private(mlp()), *arguments, **options)


def test_losses_are_those_of_evaluation() -> None:
    model = with_dropout()
    found = canary_losses(model, squared, canaries())
    model.eval()
    expected = torch.stack([squared(model, sample[None]) for sample in canaries()])
    torch.testing.assert_close(found, expected.detach())
    assert found.shape == (M,)
    assert not found.requires_grad


def test_trees_of_tensors_are_taken() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return squared(model, batch["x"])

    model = mlp()
    optimizer = private(model, loss)
    recorder = StepRecorder(optimizer, {"x": canaries()})
    optimizer.backward({"x": data()})
    with recorder:
        optimizer.step()
    assert recorder.scores().shape == canary_losses(model, loss, {"x": canaries()}).shape == (M,)
