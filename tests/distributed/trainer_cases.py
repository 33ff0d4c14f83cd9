"""Trainings of ``DPTrainer`` on one process and on several, each with a Stop in the middle if asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.dp_tools import plan_of
from tests.integrations.language import gpt2, texts

STEPS = 4


@contextmanager
def started_by_torchrun(rank: int, size: int) -> Iterator[None]:
    """The environment in which ``torchrun`` starts a process; it decides what accelerate finds."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    before = dict(os.environ)
    if size > 1:
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def train(
    rank: int,
    size: int,
    folder: str,
    stop: int | None = None,
    resumed: bool = False,
    poisson: bool = False,
    shard: Callable[[nn.Module], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a small GPT-2 by ``DPTrainer``: parameters, ledger, epsilon and log; all samples unless ``poisson``."""
    import transformers

    from clipgrad.integrations.huggingface import DPTrainer

    class Stop(Exception):
        pass

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise Stop

    seen: list[int] = []

    class Counting(DPTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            seen.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *rest)

    with started_by_torchrun(rank, size):
        pieces = 3 if size == 1 else 2
        args = transformers.TrainingArguments(
            folder,
            **{
                "per_device_train_batch_size": 12 // (size * pieces), "gradient_accumulation_steps": pieces,
                "learning_rate": 0.01, "lr_scheduler_type": "linear", "optim": "adamw_torch", "report_to": [],
                "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "steps",
                "per_device_eval_batch_size": 1, "save_steps": 1, "max_steps": STEPS, **options,
            },
        )  # fmt: skip
        model = gpt2()
        if shard is not None:
            shard(model)
        plan = plan_of(STEPS, **({"num_samples": 48, "noise_multiplier": 1.0} if poisson else {}))
        trainer = Counting(
            model, args, train_dataset=texts(48 if poisson else 12), plan=plan,
            callbacks=[Stops()],
            eval_dataset=texts(16, seed=1)[::4],  # of one length: the trainer weighs by tokens
        )  # fmt: skip
        try:
            trainer.train(resume_from_checkpoint=resumed)
        except Stop:
            torch.distributed.barrier()  # the first rank has written its checkpoint
            return {"steps": trainer.ledger.steps}
        return {
            "parameters": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
            "wrapped": type(trainer.model_wrapped).__name__,
            "steps": trainer.ledger.steps,
            "ledger": str(trainer.ledger.state_dict()),
            "epsilon": trainer.epsilon(),
            "log": trainer.state.log_history,
            "evaluated": trainer.evaluate()["eval_loss"],
            "seen": seen,
        }
