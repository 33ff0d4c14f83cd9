"""What ``DPOptimizer`` asks of a model and of a batch, beyond what the loss shows when it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from clipgrad.errors import NotPerSampleError
from clipgrad.optimizer.facade import OptimizerFacade

# What a wrapper is replaced by: its own communication would add up gradients that are not clipped.
_INSTEAD = {
    "DataParallel": "Pass the bare module (model.module), and start one process for each device with torchrun.",
    "DistributedDataParallel": "Pass the bare module, DPOptimizer(optimizer, model.module, ...): it adds up the "
    "clipped sums of all ranks itself.",
    "FullyShardedDataParallel": "Its flat parameters mix layers; shard the model with "
    "torch.distributed.fsdp.fully_shard (FSDP2) instead.",
}


def check_parts(optimizer: Any, model: Any, loss_fn: Any) -> None:
    """Refuse what cannot be wrapped, trained or differentiated.

    Raises:
        ValueError: If one of the three does not fit.
    """
    if isinstance(optimizer, OptimizerFacade) or not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer must be an ordinary torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "optimizer is LBFGS, which evaluates the loss again within a step: its gradients would be neither clipped "
            "nor noised. Use one that steps on .grad alone, such as SGD or AdamW."
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    _refuse_wrappers(model)
    if not callable(loss_fn) or isinstance(loss_fn, nn.modules.loss._Loss):
        raise ValueError(
            f"loss_fn must be a function loss_fn(model, *batch) that returns a scalar, got {type(loss_fn).__name__}. "
            "Wrap a criterion: def loss_fn(model, x, y): return criterion(model(x), y)."
        )


def _refuse_wrappers(model: nn.Module) -> None:
    """Refuse models that another library spreads over devices.

    Raises:
        ValueError: With what to do instead.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _INSTEAD:
                raise ValueError(
                    f"model holds a {type(module).__name__}, whose own gradient communication would never run, so "
                    f"replicas would drift apart or train unclipped. {_INSTEAD[kind.__name__]}"
                )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"the parameters of the model lie on several devices ({', '.join(devices[:4])}), as device_map places "
            "them, which is not supported. Put the whole model on one device, and shard it with "
            "torch.distributed.fsdp.fully_shard if it is too large for one."
        )


def refuse_foreign_parameters(owned: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """Refuse parameters of the optimizer that the model does not have.

    Raises:
        ValueError: If there is one.
    """
    ours = set(map(id, known))
    strangers = [tuple(getattr(p, "shape", ())) for p in owned if id(p) not in ours]
    if strangers:
        raise ValueError(
            f"optimizer holds {len(strangers)} parameter(s) that are not in the model, so their gradients could "
            f"not be clipped; the first has shape {strangers[0]}. Build it from model.parameters()."
        )


def refuse_hooks(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse hooks on gradients of parameters and modules, which would not run, without a word.

    Raises:
        NotPerSampleError: If there is one.
    """
    for name, parameter in parameters:
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise NotPerSampleError(
                f"parameter {name!r} has a gradient hook, which cannot run: its gradient exists only per sample, and "
                "clipped and noised in .grad. Remove the hook; change .grad in a step hook "
                "(register_step_pre_hook), which runs after the noise."
            )
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            name = next(name for name, other in model.named_modules() if other is module)
            raise NotPerSampleError(
                f"module {name or type(module).__name__!r} has a backward hook, which would see the gradients of all "
                "samples at once instead of one sample's. Remove it; change values in the forward pass instead."
            )


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield name, module


def refuse_batch_norm(model: nn.Module) -> None:
    """Refuse BatchNorm in training mode before it counts the batch in its buffers.

    Raises:
        NotPerSampleError: If there is one.
    """
    names = [name or "the model itself" for name, module in _batch_norms(model) if module.training]
    if names:
        raise NotPerSampleError(
            f"BatchNorm in training mode ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) normalises a "
            "sample with statistics of the others, so no gradient belongs to one sample. Use "
            "clipgrad.replace_batch_norm(model), which puts GroupNorm in its place, before making the optimizer; or "
            "freeze the statistics with .eval()."
        )


def check_batch(batch: tuple[Any, ...]) -> None:
    """Refuse a batch that is missing, or whose gradient the caller would expect to flow on.

    Raises:
        ValueError: If it does not fit.
    """
    if not batch:
        raise ValueError(
            "backward needs the batch, as loss_fn takes it after the model; it computes the loss itself."
        )
    leaves = batch if all(type(part) is Tensor for part in batch) else tree_leaves(batch)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ValueError(
                f"the batch holds a tensor of shape {tuple(leaf.shape)} that requires grad, but no gradient flows "
                "through the batch. Compute it inside loss_fn, or detach it if nothing before it is trained."
            )


def rows_in(batch: tuple[Any, ...], is_padding: Tensor | None) -> int:
    """Rows of a batch that are no padding, by its first tensor; 0 if it holds none."""
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    if first is None or first.dim() == 0:
        return 0
    usable = (
        isinstance(is_padding, Tensor) and not is_padding.is_meta
    )  # what else it is, is said later
    padding = int(is_padding.sum()) if usable else 0  # type: ignore[union-attr]
    return first.shape[0] - padding


def parameters_to_train(
    model: nn.Module, owned: Sequence[Tensor]
) -> tuple[tuple[str, nn.Parameter], ...]:
    """The optimizer's parameters that require grad, in the model's order, of a model that can be trained.

    Args:
        model: The model.
        owned: All parameters of the optimizer.

    Raises:
        ValueError: If a parameter is not the model's, or none is left.
        NotPerSampleError: For BatchNorm in training mode, and for gradient hooks.
    """
    named = list(model.named_parameters())
    refuse_foreign_parameters(owned, (p for _, p in named))
    ours = set(map(id, owned))
    selection = tuple((name, p) for name, p in named if id(p) in ours and p.requires_grad)
    if not selection:
        raise ValueError(
            "optimizer holds no parameter of the model that requires grad; there is nothing to train."
        )
    refuse_batch_norm(model)
    refuse_hooks(model, selection)
    return selection
