"""Make a plan from ``TrainingArguments``, and refuse the arguments that a private training cannot follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from clipgrad.integrations._batches import epoch_of
from clipgrad.plan import PrivacyPlan


class Conflict(NamedTuple):
    """This tuple describes refused values of one argument.

    Attributes:
        name: Name of the argument.
        conflicts: Returns whether a value is refused.
        why: The rest of the error message: the problem and the remedy.
    """

    name: str
    conflicts: Callable[[Any], bool]
    why: str


_DEFAULT_NORM = 1.0
_WHOLE = (
    "spreads the model over processes, but here each process holds all of it. Leave it out, or shard the model with "
    "fully_shard and write a loop of your own (docs/scaling.md)."
)
CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "fp16",
        bool,
        "scales the loss, and per-sample gradients cannot be unscaled. Use bf16=True.",
    ),
    Conflict(
        "torch_compile",
        bool,
        "compiles the model without per-sample gradients. Use DPTrainer(compile=True).",
    ),
    Conflict(
        "use_liger_kernel",
        bool,
        "replaces operations by kernels without per-sample gradients. Leave it out.",
    ),
    Conflict(
        "auto_find_batch_size",
        bool,
        "changes the batch size, which the plan accounts for. Set per_device_train_batch_size to a number that fits "
        "into memory, and gradient_accumulation_steps to the number of such microbatches in a batch.",
    ),
    Conflict(
        "train_sampling_strategy",
        lambda value: value != "random",
        "orders the samples, but the plan accounts for random batches. Leave it out.",
    ),
    Conflict(
        "dataloader_drop_last",
        bool,
        "has no effect, since every Poisson batch is a step. Leave it out.",
    ),
    Conflict(
        "include_num_input_tokens_seen",
        lambda value: value not in (False, "no"),
        "logs the number of sampled tokens, which is private. Leave it out.",
    ),
    Conflict(
        "ignore_data_skip",
        bool,
        "would repeat the interrupted epoch after a restart. Leave it out: DPTrainer resumes with fresh batches.",
    ),
    Conflict("deepspeed", bool, _WHOLE),
    Conflict("fsdp", bool, _WHOLE),
    Conflict("parallelism_config", bool, _WHOLE),
    Conflict(
        "n_gpu",
        lambda value: value > 1,
        "splits batches over several devices of one process. Start a process for each: "
        "torchrun --nproc-per-node=gpu train.py, or set CUDA_VISIBLE_DEVICES=0.",
    ),
    Conflict(
        "optim",
        lambda value: "lomo" in str(value) or str(value).endswith("layerwise"),
        "steps during backward, before gradients are clipped and get noise. Use adamw_torch, for example.",
    ),
)


def refuse_conflicts(args: Any, conflicts: Sequence[Conflict]) -> None:
    """Refuse arguments that would break privacy, or that have no effect in a private training.

    Raises:
        ValueError: If an argument is refused; the message names argument, value and remedy.
    """
    for name, conflict, why in conflicts:
        value = getattr(args, name, None)
        if value is not None and conflict(value):
            raise ValueError(f"TrainingArguments({name}={value!s}) {why}")


def logical_batch_size(args: Any) -> int:
    """Return the expected batch size that the arguments describe, of all processes together."""
    each = args.per_device_train_batch_size * args.world_size
    return int(each * args.gradient_accumulation_steps)


def refuse_spread_model(trainer: Any) -> None:
    """Refuse a model of which a process holds a part, however that came about.

    Raises:
        ValueError: With the remedy.
    """
    found = {
        "accelerate is set to FSDP, which": trainer.is_fsdp_enabled,
        "accelerate is set to DeepSpeed, which": trainer.is_deepspeed_enabled,
        "the model has DTensor parameters, whose mesh": any(
            hasattr(parameter, "device_mesh") for parameter in trainer.model.parameters()
        ),
    }
    for what, is_so in found.items():
        if is_so:
            raise ValueError(f"{what} {_WHOLE}")


def refuse_private_decisions(trainer: Any) -> None:
    """Refuse to choose a model, the end or the learning rate by an evaluation on the training dataset.

    Raises:
        ValueError: If the arguments ask for it.
    """
    metric, found = trainer.args.metric_for_best_model, trainer.eval_dataset
    evaluated = list(found.values()) if isinstance(found, dict) else [found]
    if metric is not None and any(_is_same(data, trainer.train_dataset) for data in evaluated):
        raise ValueError(
            f"TrainingArguments(metric_for_best_model={metric}) chooses by an evaluation, and eval_dataset is the "
            "training dataset. The plan does not account for such a choice. Evaluate on other data, or leave out "
            "load_best_model_at_end, metric_for_best_model and schedulers that follow a metric."
        )


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two datasets are one; a ``datasets.Dataset`` has a name of its content."""
    name = getattr(one, "_fingerprint", None)
    return one is other or (name is not None and name == getattr(other, "_fingerprint", None))


def steps_wanted(args: Any, epoch: int) -> int:
    """Return the number of steps that the Trainer would take."""
    return int(args.max_steps) if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)


def plan_and_users(
    args: Any,
    dataset: Any,
    user_column: str | None,
    plan: PrivacyPlan | None,
    target_epsilon: float | None,
    delta: float | None,
) -> tuple[PrivacyPlan, list[Any] | None]:
    """Return the given plan or one for a target epsilon, and the user of each sample if users are protected.

    Raises:
        ValueError: If arguments are missing or contradict the plan.
    """
    if dataset is None:
        raise ValueError("DPTrainer needs train_dataset; the plan depends on its size.")
    users = None if user_column is None else _column(dataset, user_column)
    if plan is None:
        unit, count = ("user", len(set(users))) if users else ("sample", _length(dataset))
        plan = _plan_of(args, count, unit, target_epsilon, delta)
    elif target_epsilon is not None or delta is not None:
        raise ValueError(
            "plan already sets what target_epsilon and delta would set. Leave them out."
        )
    _refuse_other_plan(args, plan)
    return plan, users


def _plan_of(
    args: Any, num_samples: int, unit: str, target_epsilon: float | None, delta: float | None
) -> PrivacyPlan:
    """Return a plan for a target epsilon; its other numbers come from the arguments.

    Raises:
        ValueError: If a number is missing or out of range.
    """
    if target_epsilon is None or delta is None:
        raise ValueError(
            f"DPTrainer needs plan=clipgrad.PrivacyPlan(...), or target_epsilon and delta, which are {target_epsilon} "
            f"and {delta}. For {num_samples} {unit}s, delta={0.1 / num_samples:.0e} is a usual choice."
        )
    if not args.max_grad_norm > 0:
        raise ValueError(
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) turns clipping off, but each sample's gradient "
            "must be clipped to this norm. Set it to 1.0, for example."
        )
    size = logical_batch_size(args)
    if size > num_samples:
        raise ValueError(
            f"TrainingArguments: per_device_train_batch_size * gradient_accumulation_steps * world_size is {size}, "
            f"more than the {num_samples} {unit}s of train_dataset. Lower one of them."
        )
    return PrivacyPlan.for_epsilon(
        target_epsilon,
        num_samples=num_samples,
        expected_batch_size=size,
        steps=steps_wanted(args, epoch_of(num_samples, size)),
        delta=delta,
        max_grad_norm=float(args.max_grad_norm),
        unit=unit,
    )


def _refuse_other_plan(args: Any, plan: PrivacyPlan) -> None:
    """Refuse arguments that contradict the plan.

    Raises:
        ValueError: If they do; the message names argument, value and remedy.
    """
    each, pieces = args.per_device_train_batch_size, args.gradient_accumulation_steps
    several = f" on {args.world_size} processes" if args.world_size > 1 else ""
    fitting = max(1, math.ceil(plan.expected_batch_size / (each * args.world_size)))
    if pieces != fitting:
        raise ValueError(
            f"TrainingArguments(per_device_train_batch_size={each}, gradient_accumulation_steps={pieces}){several} is "
            f"not the plan's expected_batch_size={plan.expected_batch_size:g}. "
            f"Set gradient_accumulation_steps={fitting}: a step runs its samples in microbatches of "
            "per_device_train_batch_size."
        )
    wanted = steps_wanted(args, epoch_of(plan.num_samples, plan.expected_batch_size))
    if wanted > plan.steps:
        asked = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        raise ValueError(
            f"TrainingArguments({asked}={getattr(args, asked):g}) asks for {wanted} steps, but the plan has "
            f"{plan.steps}. Set max_steps={plan.steps}, or plan for more steps."
        )
    if args.max_grad_norm not in (0.0, _DEFAULT_NORM, plan.max_grad_norm):
        raise ValueError(
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) differs from the plan's "
            f"max_grad_norm={plan.max_grad_norm}. Leave it out: the plan sets the norm to which gradients are clipped."
        )


def _length(dataset: Any) -> int:
    """Return the number of samples of a dataset.

    Raises:
        ValueError: If the dataset has no length.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__} without a length, from which no Poisson batches can be "
            "sampled. Pass plan=clipgrad.PrivacyPlan(declared_sampling='...', ...), which says how its batches are "
            "sampled."
        )
    return len(dataset)


def _column(dataset: Any, name: str) -> list[Any]:
    """Return a column of a ``datasets.Dataset`` or of a list of dictionaries.

    Raises:
        ValueError: If there is no column of that name.
    """
    if name in getattr(dataset, "column_names", ()):
        return list(dataset[name])
    try:
        return [row[name] for row in dataset]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"user_column={name!r} is no column of train_dataset. Pass the name of the column that holds the user of "
            "each sample."
        ) from error
