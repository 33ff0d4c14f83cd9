"""Define ``DPTrainer``, Hugging Face's ``Trainer`` with differential privacy; it needs the extra ``huggingface``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clipgrad.accounting import Ledger
from clipgrad.errors import PrivacyBudgetError
from clipgrad.integrations._batches import LogicalBatches, epoch_of, loader_of, rows_of
from clipgrad.integrations._huggingface_arguments import (
    CONFLICTS,
    plan_and_users,
    refuse_conflicts,
    refuse_private_decisions,
    refuse_spread_model,
)
from clipgrad.integrations._padding import refuse_influence_of_padding
from clipgrad.noise import NoiseSource
from clipgrad.optimizer import DPOptimizer
from clipgrad.options import Performance
from clipgrad.plan import PrivacyPlan
from clipgrad.result import NotPrivate

try:
    from transformers import Trainer

    from clipgrad.integrations._huggingface_logs import FiniteLosses, NoisedNorm
    from clipgrad.integrations._transfer import Transfer
except ImportError as error:
    raise ImportError(
        "clipgrad.integrations.huggingface needs transformers and accelerate: pip install 'clipgrad[huggingface]'."
    ) from error


class PrivateTraining:
    """This mix-in makes a ``transformers.Trainer`` private; name it before the trainer's class among the bases.

    Args:
        *args: Arguments of the trainer.
        plan: The plan of the run. One step of the trainer is one step of the plan on one Poisson batch, which runs in
            ``gradient_accumulation_steps`` microbatches of ``per_device_train_batch_size`` samples.
        target_epsilon: The epsilon at the end of the run, in place of a plan. ``TrainingArguments`` then set batch
            size, ``num_train_epochs`` or ``max_steps``, and ``max_grad_norm``, to which each gradient is clipped.
        delta: Probability with which epsilon may fail to hold.
        user_column: Name of the column of ``train_dataset`` that holds the user of each sample. Users are then
            sampled, clipped and protected, and batch sizes count users.
        samples_per_user: The largest number of samples of a user in a batch, with ``user_column``.
        noise: The noise source, see ``DPOptimizer``.
        compile: Whether steps are compiled, see ``DPOptimizer``.
        performance: See ``DPOptimizer``.
        **trainer: Keyword arguments of the trainer.

    Raises:
        ValueError: If an argument is refused; the message names refused ``TrainingArguments``.
    """

    _conflicts = CONFLICTS

    def __init__(
        self,
        *args: Any,
        plan: PrivacyPlan | None = None,
        target_epsilon: float | None = None,
        delta: float | None = None,
        user_column: str | None = None,
        samples_per_user: int | None = None,
        noise: NoiseSource | None = None,
        compile: bool | str = False,
        performance: Performance | None = None,
        **trainer: Any,
    ) -> None:
        self._private: DPOptimizer[Any] | None = None
        super().__init__(*args, **trainer)
        refuse_conflicts(self.args, self._conflicts)
        refuse_spread_model(self)
        refuse_private_decisions(self)
        self._samples_per_user = samples_per_user
        self.plan, self._users = plan_and_users(
            self.args, self.train_dataset, user_column, plan, target_epsilon, delta
        )
        self._chosen: dict[str, Any] = {
            "noise": noise,
            "compile": compile,
            "performance": performance,
        }
        self._rows_of_step = 0
        self._loss: Any = None
        self._unchecked: tuple[Any, Any] | None = None
        self._watch = NoisedNorm()
        self.add_callback(self._watch)
        self._finite = FiniteLosses()

    @property
    def dp_optimizer(self) -> DPOptimizer[Any]:
        """Return the optimizer that clips and adds noise.

        Raises:
            RuntimeError: If ``train`` was not called yet.
        """
        if self._private is None:
            raise RuntimeError("dp_optimizer exists once train() has begun; call train() first.")
        return self._private

    @property
    def ledger(self) -> Ledger:
        """Return the ledger of what was released so far."""
        return self.dp_optimizer.ledger

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon of what was released so far, which is 0 before the first step."""
        return 0.0 if self._private is None else self._private.epsilon(delta)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Wrap the trainer's own optimizer in a ``DPOptimizer``."""
        inner = super().create_optimizer(model)
        # A second train() finds the DPOptimizer of the first, inside accelerate's wrapper.
        if self._private is not None and getattr(inner, "optimizer", inner) is self._private:
            return inner
        # PEFT adds this hook for reentrant checkpoints. Here it would set requires_grad on one sample's tensor.
        getattr(self.model, "disable_input_require_grads", lambda: None)()
        if self.args.world_size > 1:
            # accelerate leaves a model alone that it has prepared: DDP would keep a second copy of all gradients.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.model._is_accelerate_prepared = True
        self._loss = self._loss_of_batch()
        self.optimizer = self._private = DPOptimizer(
            inner,
            self.model,
            self._loss,
            plan=self.plan,
            microbatch_size=self.args.per_device_train_batch_size,
            keep_batch_dim=self.plan.unit == "sample",
            **self._chosen,
        )
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return the plan's batches in microbatches, or the trainer's own batches if the plan declares sampling."""
        usual, plan = super().get_train_dataloader(), self.plan
        if plan.declared_sampling is not None:
            return usual
        args = self.args
        loader = loader_of(
            plan,
            usual.dataset,
            self._users,
            self._samples_per_user,
            collate_fn=usual.collate_fn,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        self._unchecked = None if self._users else (usual.dataset, usual.collate_fn)
        pieces = LogicalBatches(
            loader,
            pieces=args.gradient_accumulation_steps,
            rows=args.per_device_train_batch_size,
            epoch=epoch_of(plan.num_samples, plan.expected_batch_size),
            done=lambda: self.state.global_step,
        )
        return DataLoader(pieces, batch_size=None)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the microbatches of one step, and None: each sample's loss is a mean over its own tokens."""
        pieces = list(islice(epoch_iterator, num_batches))
        self._rows_of_step = sum(map(rows_of, pieces))
        return pieces, None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as usual; ``logging_nan_inf_filter`` is the user's again after an error."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._finite.restore(self.args)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Add clipped gradients of a microbatch, and return its share of the step's mean loss, which is not private."""
        self._check(model)
        model.train()
        transfer = Transfer(dict(inputs), self.args.device)
        piece = transfer.batch
        if self._loss is model_loss and not set(self.label_names) & piece.keys():
            raise ValueError(
                f"a batch holds {', '.join(piece)}, but no {' or '.join(self.label_names)}, without which the model "
                "returns no loss. Add them in the dataset or the data_collator, or pass compute_loss_func."
            )
        rows = rows_of(piece)
        returned = self.dp_optimizer.backward(piece)
        transfer.wait()
        loss: Tensor = returned.loss if isinstance(returned, NotPrivate) else returned
        filters = self._finite.hide(self.args)
        if not rows:
            return loss.new_zeros(())
        return (self._finite.of(loss) if filters else loss) * (rows / self._rows_of_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log epsilon and the norm of the noisy gradient, and rename losses to ``..._not_private``."""
        if "grad_norm" in logs:  # The trainer measured .grad before it was set.
            del logs["grad_norm"]
            norm = self._watch.norm()
            if norm is not None:
                logs["noised_grad_norm"] = norm
        for name in ("loss", "train_loss"):
            if name in logs:
                logs[f"{name}_not_private"] = logs.pop(name)
                logs["epsilon"] = self.epsilon()
        super().log(logs, start_time)

    def num_examples(self, dataloader: Any) -> int:
        """Return the plan's number of samples or users, which is public; for other data the trainer's count."""
        ours = isinstance(dataloader.dataset, LogicalBatches)
        return self.plan.num_samples if ours else int(super().num_examples(dataloader))

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0, since the work of a step depends on the number of sampled rows, which is private."""
        self._finite.restore(self.args)  # the trainer calls this after it has looked at the loss
        return 0

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the search, since each trial would be a training on private data that is not accounted for.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "hyperparameter_search trains on the private data many times, which the plan does not account for. Search "
            "on public data, or account for each trial with plan.continuing(ledger)."
        )

    def _check(self, model: nn.Module) -> None:
        """Refuse a model whose gradients would not be clipped, and a restart whose ledger lacks steps."""
        if model is not self.dp_optimizer.model:
            raise ValueError(
                f"the model was wrapped in a {type(model).__name__} after DPTrainer was made, so its gradients would "
                "not be clipped. Train the bare model."
            )
        done, known = self.state.global_step, self.ledger.steps_of(self.plan.run.name)
        if known < done:
            raise PrivacyBudgetError(
                f"the checkpoint is at step {done}, but holds {known} steps of the ledger, so epsilon would be too "
                "small. Resume from a checkpoint with an optimizer.pt (save_only_model=False)."
            )
        if self._unchecked is not None:
            half = self.args.bf16 or any(p.itemsize < 4 for p in model.parameters())
            refuse_influence_of_padding(
                self._loss, model, *self._unchecked, tolerance=3e-2 if half else 1e-3
            )
            self._unchecked = None

    def _loss_of_batch(self) -> Any:
        """Return the model's own loss, which PyTorch can capture, unless the trainer computes another loss."""
        usual = type(self).compute_loss is Trainer.compute_loss
        if usual and self.label_smoother is None and self.compute_loss_func is None:
            return model_loss

        def loss_fn(model: nn.Module, inputs: dict[str, Any]) -> Any:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, inputs)

        return loss_fn


class DPTrainer(PrivateTraining, Trainer):
    """This ``transformers.Trainer`` trains with differential privacy; its arguments are those of ``PrivateTraining``.

    Collators, evaluation, schedulers, callbacks, checkpoints, resuming and PEFT models work as usual.
    """


def model_loss(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Return the loss that a model computes by itself."""
    outputs = model(**inputs)
    return outputs["loss"] if isinstance(outputs, dict) else outputs[0]
