"""Test that ``DPModule`` trains as ``DPOptimizer`` does under Lightning's automatic optimization."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clipgrad import BandedFactorisation, PrivacyPlan, poisson_loader
from clipgrad.errors import NotPerSampleError, UnaccountedBatchError
from tests import oracle
from tests.dp_tools import mlp, plan_of, trained, values

L = pytest.importorskip("lightning.pytorch")
# Lightning puts a function of its own in the place of torch.compile, also for the other tests of this process.
torch.compile = inspect.unwrap(torch.compile)

from clipgrad.integrations.lightning import DPModule, private_loader  # noqa: E402

NORM = 0.5
# What Lightning says of a small machine, of loops without a logger, and of itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec",
    "ignore:.*isinstance.treespec",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You defined a `validation_step`",
    "ignore:The number of training batches",
    "ignore:.*exists and is not empty",
)  # fmt: skip
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Classifier(DPModule):
    def __init__(self, plan: PrivacyPlan, **options: Any) -> None:
        super().__init__()
        self.net, self.plan, self.options = mlp(), plan, options

    def loss(self, x: Tensor, y: Tensor) -> Any:
        logits = self.net(x)
        correct = (logits.argmax(1) == y).double().mean()
        return nn.functional.cross_entropy(logits, y), {"accuracy": correct}

    def configure_optimizers(self) -> Any:
        inner = torch.optim.Adam(self.parameters(), lr=0.1)
        private = self.private(inner, plan=self.plan, **self.options)
        return [private], [torch.optim.lr_scheduler.StepLR(private, step_size=2)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(*batch)[0])


def trainer_of(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1,
        "default_root_dir": folder, "max_epochs": 1,
    }  # fmt: skip
    return L.Trainer(**{**defaults, **options})


def by_hand(module: Classifier, steps: int) -> dict[str, Tensor]:
    """Train by a plain loop over single samples with the same optimizer."""
    inner = torch.optim.Adam(module.parameters(), lr=0.1)

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = module.loss(x, y)[0]
        return found

    for _ in range(steps):
        each = oracle.per_sample_gradients(module, loss, data().tensors)
        sums, norms = oracle.clipped_sum(each, NORM)
        assert (norms > NORM).any()
        for name, parameter in module.named_parameters():
            parameter.grad = sums[name] / 12
        inner.step()
    return values(module)


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 5}])
def test_automatic_optimization_takes_the_steps_of_a_slow_loop(
    options: dict[str, Any], tmp_path: Path
) -> None:
    module = Classifier(plan_of(2), **options)
    expected = by_hand(copy.deepcopy(module), 2)
    trainer = trainer_of(tmp_path, max_epochs=2)
    trainer.fit(module, private_loader(data(), plan=module.plan), DataLoader(data(), batch_size=12))
    torch.testing.assert_close(values(module), expected, rtol=0, atol=1e-9)
    assert trainer.global_step == 2
    assert module._private is not None
    assert module._private.ledger.steps == 2
    assert "val_loss" in trainer.callback_metrics


def test_what_is_logged(tmp_path: Path) -> None:
    module = Classifier(plan_of(1))
    with torch.no_grad():
        x, y = data().tensors
        loss, metrics = copy.deepcopy(module).loss(x, y)
    trainer = trainer_of(tmp_path)
    trainer.fit(module, private_loader(data(), plan=module.plan))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged["loss_not_private"] == pytest.approx(float(loss))
    assert logged["accuracy_not_private"] == pytest.approx(float(metrics["accuracy"]))
    assert math.isinf(logged["epsilon"])
    assert logged.keys() == {"loss_not_private", "accuracy_not_private", "epsilon"}


def small_plan(steps: int = 7) -> PrivacyPlan:
    """Poisson batches of 4 of 12 samples have three steps in an epoch."""
    return plan_of(steps, expected_batch_size=4, noise_multiplier=1.0)


def test_epochs_of_poisson_batches(tmp_path: Path) -> None:
    module = Classifier(small_plan())
    trainer = trainer_of(tmp_path, max_epochs=-1, max_steps=7)
    trainer.fit(module, private_loader(data(), plan=module.plan))
    assert (trainer.global_step, trainer.current_epoch) == (7, 3)
    assert module.epsilon() == pytest.approx(module.plan.epsilon())
    assert float(trainer.logged_metrics["epsilon"]) == pytest.approx(module.plan.epsilon())


class Stop(Exception):
    """This error stops a training in the middle, as a kill would."""


class StopsAfter(L.Callback):  # type: ignore[misc, name-defined]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Stop


@pytest.mark.parametrize("whole_run", [False, True])
@pytest.mark.parametrize("stop", [3, 5])
def test_resume_keeps_the_ledger(stop: int, whole_run: bool, tmp_path: Path) -> None:
    def loader(plan: PrivacyPlan) -> Any:
        make = poisson_loader if whole_run else private_loader
        return make(data(), plan=plan)

    options = {"max_epochs": 1} if whole_run else {"max_epochs": -1, "max_steps": 7}
    saves = L.callbacks.ModelCheckpoint(
        tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    first = Classifier(small_plan())
    trainer = trainer_of(
        tmp_path, callbacks=[saves, StopsAfter(stop + 1)], enable_checkpointing=True, **options
    )
    with pytest.raises(Stop):
        trainer.fit(first, loader(first.plan))
    again = Classifier(small_plan())
    trainer = trainer_of(tmp_path, **options)
    trainer.fit(
        again, loader(again.plan), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True
    )
    assert trainer.global_step == 7
    assert again._private is not None
    assert again._private.ledger.steps == 7
    assert again.epsilon() == pytest.approx(small_plan().epsilon())


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, second = (Classifier(plan_of(4)) for _ in range(3))
    trainer_of(tmp_path, max_epochs=4).fit(whole, private_loader(data(), plan=whole.plan))
    trainer = trainer_of(tmp_path, max_epochs=2)
    trainer.fit(first, private_loader(data(), plan=first.plan))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(tmp_path, max_epochs=4).fit(
        second, private_loader(data(), plan=second.plan), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )  # fmt: skip
    torch.testing.assert_close(values(second), values(whole), rtol=0, atol=1e-9)


def test_other_batches_than_the_plans_are_refused(tmp_path: Path) -> None:
    module = Classifier(small_plan())
    with pytest.raises(UnaccountedBatchError, match="no loader of this plan made"):
        trainer_of(tmp_path, max_steps=7).fit(
            module, DataLoader(data(), batch_size=4, shuffle=True)
        )


class Logs(Classifier):
    def loss(self, x: Tensor, y: Tensor) -> Any:
        loss, _ = super().loss(x, y)
        self.log("loss", loss)
        return loss


def test_log_inside_the_loss_says_what_to_do(tmp_path: Path) -> None:
    module = Logs(plan_of(1))
    with pytest.raises(NotPerSampleError, match=r"\(loss, metrics\)"):
        trainer_of(tmp_path).fit(module, private_loader(data(), plan=module.plan))


class NotWrapped(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "accumulation": ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2.*microbatch_size"),
    "clipping": ({"gradient_clip_val": 1.0}, r"gradient_clip_val=1.0\) clips the sum of a batch"),
    "epochs": (
        {"max_epochs": 9},
        r"asks for 9 steps, but the plan has 4. Set Trainer\(max_steps=4\)",
    ),
    "endless": ({"max_epochs": -1}, "asks for without end|asks for steps without end"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_of_the_trainer_are_refused_by_name(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    module = Classifier(plan_of())
    trainer = trainer_of(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, private_loader(data(), plan=module.plan))


def test_an_optimizer_that_is_not_private_is_refused(tmp_path: Path) -> None:
    module = NotWrapped(plan_of())
    before = values(module)
    with pytest.raises(ValueError, match=r"Let it return self\.private\(optimizer, plan=plan\)"):
        trainer_of(tmp_path).fit(module, private_loader(data(), plan=module.plan))
    assert all(torch.equal(value, before[name]) for name, value in trained(module).items())


class Plateau(Classifier):
    def configure_optimizers(self) -> Any:
        private = self.private(torch.optim.Adam(self.parameters()), plan=self.plan)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(private)
        config = {"scheduler": scheduler, "monitor": "loss_not_private", "interval": "step"}
        return {"optimizer": private, "lr_scheduler": config}


DECISIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "end": (
        lambda: L.callbacks.EarlyStopping("loss_not_private"),
        r"EarlyStopping\(monitor='loss_not_private'\) decides",
    ),
    "metric": (
        lambda: L.callbacks.EarlyStopping("accuracy_not_private_step", mode="max"),
        r"EarlyStopping\(monitor='accuracy_not_private_step'\) decides",
    ),
    "checkpoint": (
        lambda: L.callbacks.ModelCheckpoint(monitor="loss_not_private"),
        r"ModelCheckpoint\(monitor='loss_not_private'\) decides",
    ),
    "batches": (L.callbacks.SpikeDetection, "SpikeDetection leaves out batches by their loss"),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions_by_values_without_noise_are_refused(name: str, tmp_path: Path) -> None:
    make, message = DECISIONS[name]
    module = Classifier(plan_of(1))
    before = values(module)
    trainer = trainer_of(tmp_path, callbacks=[make()], enable_checkpointing=True)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, private_loader(data(), plan=module.plan))
    assert all(torch.equal(value, before[name]) for name, value in trained(module).items())


def test_a_schedule_by_the_training_loss_is_refused(tmp_path: Path) -> None:
    module = Plateau(plan_of(1))
    with pytest.raises(
        ValueError, match=r"ReduceLROnPlateau\(monitor='loss_not_private'\) decides"
    ):
        trainer_of(tmp_path).fit(module, private_loader(data(), plan=module.plan))


@pytest.mark.parametrize("whole_run", [False, True])
@pytest.mark.parametrize("same", [True, False])
def test_decisions_by_a_validation_on_the_training_data(
    same: bool, whole_run: bool, tmp_path: Path
) -> None:
    module, rows = Classifier(plan_of(1)), data()
    train = (poisson_loader if whole_run else private_loader)(rows, plan=module.plan)
    validation = DataLoader(rows if same else data(), batch_size=12)
    trainer = trainer_of(tmp_path, callbacks=[L.callbacks.EarlyStopping("val_loss")])
    if same:
        with pytest.raises(ValueError, match="the validation data is the training dataset"):
            trainer.fit(module, train, validation)
    else:
        trainer.fit(module, train, validation)
    assert trainer.global_step == (0 if same else 1)


def test_correlated_noise_is_refused_whatever_the_loader(tmp_path: Path) -> None:
    """Lightning writes the optimizer's state, and so the noise that was added, to files that others can read."""
    plan = plan_of(3, expected_batch_size=4, noise_multiplier=1.0, accountant="pld",
                   mechanism=BandedFactorisation(bands=2))  # fmt: skip
    module = Classifier(plan)
    with pytest.raises(ValueError, match=r"must stay secret.*files that others can read"):
        trainer_of(tmp_path).fit(module, poisson_loader(data(), plan=plan))
