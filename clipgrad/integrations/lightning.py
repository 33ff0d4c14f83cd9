"""Define ``DPModule``, a ``LightningModule`` with differential privacy; it needs the extra ``lightning``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clipgrad.integrations._batches import EpochLoader, epoch_of, loader_of
from clipgrad.integrations._lightning_arguments import (
    refuse_conflicts,
    refuse_private_decisions,
)
from clipgrad.noise import NoiseSource
from clipgrad.optimizer import DPOptimizer
from clipgrad.options import Performance
from clipgrad.plan import PrivacyPlan
from clipgrad.result import NotPrivate
from clipgrad.sampling import PaddedBatch

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise ImportError(
        "clipgrad.integrations.lightning needs lightning: pip install 'clipgrad[lightning]'."
    ) from error


class DPModule(LightningModule):
    """This ``LightningModule`` clips each sample's gradient and adds noise in automatic optimization.

    Define ``loss`` in place of ``training_step``, and wrap the optimizer in ``configure_optimizers`` with ``private``.
    Epochs, ``global_step``, schedulers and validation work as usual, and so do checkpoints, which hold the ledger. The
    log shows ``epsilon``, ``loss_not_private``, and the batch mean of each metric in a dictionary as
    ``<name>_not_private``.
    """

    _private: DPOptimizer[Any] | None = None

    def loss(self, *batch: Any) -> Any:
        """Return the loss of a batch of one sample, or ``(loss, metrics)``; do not call ``self.log`` in it."""
        raise NotImplementedError(
            f"{type(self).__name__}.loss(*batch) is missing. Define it in place of training_step."
        )

    def private(
        self,
        optimizer: Optimizer,
        *,
        plan: PrivacyPlan,
        microbatch_size: int | str | None = None,
        keep_batch_dim: bool = True,
        noise: NoiseSource | None = None,
        compile: bool | str = False,
        performance: Performance | None = None,
    ) -> DPOptimizer[Any]:
        """Wrap the optimizer in a ``DPOptimizer``, which ``configure_optimizers`` must return.

        The arguments are those of ``DPOptimizer``. ``private_loader(dataset, plan=plan)`` makes the plan's batches.

        Raises:
            ValueError: If an argument of the trainer contradicts the plan.
        """
        replicated = isinstance(self.trainer.strategy, ReplicatedStrategy)
        refuse_conflicts(self.trainer, plan, is_replicated=replicated)
        self._private = _RunsClosure(
            optimizer,
            self,
            _loss_of,
            plan=plan,
            microbatch_size=microbatch_size,
            keep_batch_dim=keep_batch_dim,
            noise=noise,
            compile=compile,
            performance=performance,
        )
        return self._private

    def epsilon(self) -> float:
        """Return the epsilon of what was released so far, which is 0 before the first step."""
        return 0.0 if self._private is None else self._private.epsilon()

    # ------------------------------------------------------------------ hooks of Lightning

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Add up clipped gradients, and log values that are not private as ``..._not_private``."""
        if self._private is None:
            raise ValueError(
                "configure_optimizers returned an optimizer that is not private. Let it return "
                "self.private(optimizer, plan=plan)."
            )
        refuse_private_decisions(self.trainer)
        several = isinstance(batch, tuple | list) and not isinstance(batch, PaddedBatch)
        returned = self._private.backward(*batch) if several else self._private.backward(batch)
        loss: Tensor = returned
        if isinstance(returned, NotPrivate):
            loss, metrics = returned
            for name, values in metrics.items() if isinstance(metrics, Mapping) else ():
                self.log(f"{name}_not_private", values.double().mean(), batch_size=1)
        self.log("loss_not_private", loss, prog_bar=True, batch_size=1)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing, since ``training_step`` has added up clipped gradients."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing, since Lightning calls this between ``training_step`` and the step, which needs the sums."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log epsilon as often as the trainer logs."""
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            self.log("epsilon", self.epsilon(), prog_bar=True, batch_size=1)


def private_loader(
    dataset: Any,
    *,
    plan: PrivacyPlan,
    user_ids: Sequence[Any] | None = None,
    samples_per_user: int | None = None,
    **options: Any,
) -> EpochLoader:
    """Return the training loader of a plan, one iteration of which is an epoch.

    Args:
        dataset: A map-style dataset.
        plan: The plan.
        user_ids: The user of each sample, for a plan with ``unit="user"``; see ``user_loader``.
        samples_per_user: The largest number of samples of a user in a batch; see ``user_loader``.
        **options: Options such as ``collate_fn``, ``num_workers`` and ``pin_memory``; see ``poisson_loader``.
    """
    loader = loader_of(plan, dataset, user_ids, samples_per_user, **options)
    return EpochLoader(loader, epoch_of(plan.num_samples, plan.expected_batch_size))


class ReplicatedStrategy(DDPStrategy):
    """Several devices, each with the whole model: ``Trainer(devices=2, strategy=ReplicatedStrategy())``.

    It starts processes as Lightning's ``DDPStrategy`` does, and has its arguments. The model stays as it is: gradients
    are clipped and added up by ``DPOptimizer``. Make the loader once the processes are there, in ``train_dataloader``.
    """

    def configure_ddp(self) -> None:
        """Leave the model alone: DDP would wait for gradients of whole batches."""


class _RunsClosure(DPOptimizer[Any]):
    """This optimizer runs the closure in which Lightning wraps ``training_step``, before the private step."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        found = None
        if closure is not None:
            with torch.enable_grad():
                found = closure()
        super().step()
        return found


def _loss_of(module: DPModule, *batch: Any) -> Any:
    return module.loss(*batch)
