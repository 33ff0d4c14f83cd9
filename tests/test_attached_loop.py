"""Test that an attached loop gives the sums and the ledger of ``DPOptimizer``, and test its refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clipgrad import (
    DPOptimizer,
    PrivacyPlan,
    attach,
    load_checkpoint,
    poisson_loader,
    save_checkpoint,
)
from clipgrad.errors import NotPerSampleError, UnaccountedBatchError, UnclippedGradientError
from tests import oracle
from tests.dp_tools import mlp, plan_of, sgd, values

NORM = 0.5
LABELS = torch.arange(12) % 2


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(12, 4, generator=generator, dtype=torch.float64), LABELS)


def loop(model: Any, optimizer: Any, criterion: Any, loader: Any) -> list[float]:
    """Run the loop that every tutorial shows."""
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sums_of(model: nn.Module, criterion: Callable[..., Tensor]) -> dict[str, Tensor]:
    each = oracle.per_sample_gradients(
        model, lambda m, x, y: criterion(m(x), y), (data().tensors[0], LABELS)
    )
    sums, norms = oracle.clipped_sum(each, NORM)
    assert (norms > NORM).any()
    return sums


CRITERIA: dict[str, Callable[..., Tensor]] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "function": lambda output, y: nn.functional.cross_entropy(3 * output, y),
}


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.parametrize("name", CRITERIA)
def test_the_unchanged_loop_takes_the_steps_of_a_slow_one(
    name: str, microbatch_size: int | None
) -> None:
    criterion, model, plan = CRITERIA[name], mlp(), plan_of(3)
    expected = copy.deepcopy(model)
    losses = []
    for _ in range(3):
        losses.append(criterion(expected(data().tensors[0]), LABELS).item())
        sums = sums_of(expected, criterion)
        with torch.no_grad():
            for key, parameter in expected.named_parameters():
                parameter -= sums[key] / 12
    attached = attach(model, sgd(model), criterion, plan=plan, microbatch_size=microbatch_size)
    found = loop(
        attached.model, attached.optimizer, attached.criterion, poisson_loader(data(), plan=plan)
    )
    torch.testing.assert_close(values(model), values(expected), rtol=0, atol=1e-9)
    assert found == pytest.approx(losses)
    assert attached.optimizer.ledger.steps == 3


def test_a_model_that_returns_its_loss() -> None:
    pytest.importorskip("transformers")
    from tests.integrations import language

    rows = language.together(language.texts())
    plan = plan_of(1)
    model: Any = language.gpt2()
    sums = language.clipped(model, language.texts(), NORM)
    attached, optimizer, criterion = attach(model, sgd(model), plan=plan)
    with pytest.raises(ValueError, match="attach was given no criterion"):
        criterion(torch.ones(2), torch.ones(2))
    for (index,) in poisson_loader(TensorDataset(torch.arange(12)), plan=plan):
        output = attached(**{name: column[index] for name, column in rows.items()})
        assert output["loss"] is output.loss
        output.loss.backward()
        torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=0, atol=1e-9)
        optimizer.step()
    assert attached.config is model.config
    with pytest.raises(ValueError, match=r"without \.loss\. Call it with labels"):
        attached(input_ids=rows["input_ids"])


def test_the_loop_resumes_with_its_ledger(tmp_path: Any) -> None:
    def parts(plan: PrivacyPlan) -> dict[str, Any]:
        model = mlp()
        attached = attach(model, sgd(model), nn.CrossEntropyLoss(), plan=plan)
        return {
            "model": attached.model,
            "optimizer": attached.optimizer,
            "loader": poisson_loader(data(), plan=plan),
            "criterion": attached.criterion,
        }

    def stateful(found: dict[str, Any]) -> dict[str, Any]:
        return {key: part for key, part in found.items() if key != "criterion"}

    def small() -> PrivacyPlan:
        return plan_of(7, expected_batch_size=4, noise_multiplier=1.0)

    first, step = parts(small()), 0
    for x, y in first["loader"]:
        first["criterion"](first["model"](x), y).backward()
        first["optimizer"].step()
        if (step := step + 1) == 4:
            save_checkpoint(tmp_path / "run.pt", stateful(first))
            break
    again = parts(small())
    assert load_checkpoint(tmp_path / "run.pt", stateful(again))
    loop(again["model"], again["optimizer"], again["criterion"], again["loader"])
    assert again["optimizer"].ledger.steps == 7
    assert again["optimizer"].epsilon() == pytest.approx(small().epsilon())


def test_evaluation_is_the_model_itself() -> None:
    model = mlp()
    attached, _, criterion = attach(model, sgd(model), nn.CrossEntropyLoss(), plan=plan_of(3))
    x, y = data().tensors
    with torch.no_grad():
        assert torch.equal(attached(x), model(x))
        assert criterion(attached(x), y).item() == nn.CrossEntropyLoss()(model(x), y).item()
    attached.eval()
    assert not model.training
    assert torch.equal(attached(x), model(x))
    attached.train()
    assert attached(x).argmax(1).shape == (12,)
    assert attached.state_dict().keys() == model.state_dict().keys()


def test_autocast_of_the_loop_holds_in_backward() -> None:
    """The criterion receives half-precision outputs, as in the loop's own forward pass."""
    seen: list[torch.dtype] = []

    def criterion(output: Tensor, y: Tensor) -> Tensor:
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output.float(), y)

    model = mlp(dtype=torch.float32)
    attached, optimizer, criterion_ = attach(model, sgd(model), criterion, plan=plan_of(3))
    for x, y in poisson_loader(data(), plan=optimizer._account.plan):  # type: ignore[union-attr]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion_(attached(x.float()), y)
        loss.backward()
        optimizer.step()
    assert set(seen) == {torch.bfloat16}


Loop = Callable[[Any, Any, Any, Tensor, Tensor], Any]


def _scaled(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    (criterion(model(x), y) / 2).backward()


def _scaled_in_place(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    loss = criterion(model(x), y)
    loss /= 2
    loss.backward()


def _penalty(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    (criterion(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()


def _twice(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    loss = criterion(model(x), y)
    loss.backward()
    loss.backward()


def _retained(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    criterion(model(x), y).backward(retain_graph=True)


def _between(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    criterion(model(x).softmax(1), y)


def _earlier(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    one = model(x)
    model(x)
    criterion(one, y)


def _own_criterion(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


def _scaler(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(criterion(model(x), y)).backward()


REFUSED: dict[str, tuple[Loop, str]] = {
    "scaled": (_scaled, r"Call loss\.backward\(\) once.*accumulate with microbatch_size"),
    "scaled in place": (_scaled_in_place, r"Call loss\.backward\(\) once"),
    "a penalty": (_penalty, "a value computed from the loss"),
    "twice": (_twice, "called a second time"),
    "retain_graph": (_retained, "with arguments"),
    "something between": (_between, "Do what comes between them in the criterion"),
    "an earlier output": (_earlier, "something else than the output of the last model"),
    "another criterion": (_own_criterion, "Use the criterion that attach returned"),
    "GradScaler": (_scaler, "leave out GradScaler"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loop_does_besides_is_refused(name: str) -> None:
    act, message = REFUSED[name]
    model, plan = mlp(), plan_of(3)
    before = values(model)
    attached, optimizer, criterion = attach(model, sgd(model), nn.CrossEntropyLoss(), plan=plan)
    (x, y) = next(iter(poisson_loader(data(), plan=plan)))
    with pytest.raises(NotPerSampleError, match=message):
        act(attached, optimizer, criterion, x, y)
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_the_optimizer_and_the_loader_of_before_are_refused() -> None:
    model = mlp()
    old = sgd(model)
    attached, optimizer, criterion = attach(model, old, nn.CrossEntropyLoss(), plan=plan_of(3))
    with pytest.raises(UnaccountedBatchError):
        loop(attached, optimizer, criterion, DataLoader(data(), batch_size=4))
    for x, y in poisson_loader(data(), plan=optimizer._account.plan):  # type: ignore[union-attr]
        criterion(attached(x), y).backward()
        with pytest.raises(UnclippedGradientError, match="own step"):
            old.step()
        break
    model_itself = mlp()
    private = attach(model_itself, sgd(model_itself), nn.CrossEntropyLoss(), plan=plan_of(3))
    x, y = data().tensors
    nn.CrossEntropyLoss()(model_itself(x), y).backward()  # past attach
    with pytest.raises(UnclippedGradientError):
        private.optimizer.step()


def test_arguments() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"criterion must be a function.*got str"):
        attach(model, sgd(model), "mse", plan=plan_of(3))  # type: ignore[arg-type]
    assert isinstance(
        attach(model, sgd(model), nn.MSELoss(), plan=plan_of(3)).optimizer, DPOptimizer
    )
