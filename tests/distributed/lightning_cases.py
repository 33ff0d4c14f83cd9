"""A training of ``DPModule`` on one process and on several."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clipgrad import PrivacyPlan
from tests.distributed.trainer_cases import started_by_torchrun
from tests.dp_tools import mlp, plan_of

STEPS = 4


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x.sum(1) > 0).long())


def fit(
    rank: int,
    size: int,
    folder: str,
    until: int = STEPS,
    resume: bool = False,
    strategy: str = "replicated",
) -> dict[str, Any]:
    """Train until a step; parameters, ledger and what the model was wrapped in."""
    compiles = torch.compile
    import lightning.pytorch as lightning

    torch.compile = inspect.unwrap(compiles)  # Lightning puts a function of its own in its place
    from clipgrad.integrations.lightning import DPModule, ReplicatedStrategy, private_loader

    class Classifier(DPModule):
        def __init__(self, plan: PrivacyPlan) -> None:
            super().__init__()
            self.net, self.plan = mlp(), plan

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            inner = torch.optim.Adam(self.parameters(), lr=0.1)
            private = self.private(inner, plan=self.plan)
            return [private], [torch.optim.lr_scheduler.StepLR(private, step_size=2)]

        def train_dataloader(self) -> Any:
            return private_loader(data(), plan=self.plan)

    with started_by_torchrun(rank, size):
        if size > 1:
            os.environ["TORCHELASTIC_RUN_ID"] = "test"
        options: dict[str, Any] = {}
        if size > 1:
            options["strategy"] = ReplicatedStrategy() if strategy == "replicated" else strategy
        trainer = lightning.Trainer(
            accelerator="cpu", devices=size, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
            default_root_dir=folder, max_epochs=-1, max_steps=until, **options,
        )  # fmt: skip
        module = Classifier(plan_of(STEPS))
        path = Path(folder) / "last.ckpt"
        trainer.fit(module, ckpt_path=path if resume else None)
        trainer.save_checkpoint(path)
    assert module._private is not None
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "wrapped": type(trainer.strategy.model).__name__,
        "steps": trainer.global_step,
        "ledger": str(module._private.ledger.state_dict()),
        "ledger steps": module._private.ledger.steps,
    }
