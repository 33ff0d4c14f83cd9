"""This module checks the arguments, the model and the batch of a ``DPOptimizer`` before the loss runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from clipgrad.batch_norm import batch_norm_error
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
    """Refuse an optimizer, model or loss that is not supported.

    Raises:
        ValueError: If one of the three is not supported.
    """
    if isinstance(optimizer, OptimizerFacade) or not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer must be an ordinary torch.optim.Optimizer, got {type(optimizer).__name__}. Pass an instance "
            "such as torch.optim.AdamW(model.parameters()), and of a DPOptimizer what it wraps: optimizer.inner."
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "optimizer is LBFGS, which evaluates the loss again within a step: its gradients would be neither clipped "
            "nor noised. Use an optimizer that reads .grad alone, such as SGD or AdamW."
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    _refuse_wrappers(model)
    is_criterion = isinstance(loss_fn, nn.modules.loss._Loss) or any(
        loss_fn is function for function in vars(nn.functional).values()
    )
    if not callable(loss_fn) or is_criterion:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(
            f"loss_fn must be a function loss_fn(model, *batch) that returns a scalar, got {name}. "
            "Wrap a criterion: def loss_fn(model, x, y): return criterion(model(x), y)."
        )


def is_compiled(function: Any) -> bool:
    """Return whether ``torch.compile`` made a function; what ``torch.compiler.disable`` made looks alike."""
    made_by_dynamo = hasattr(function, "_torchdynamo_orig_callable")
    return made_by_dynamo and not getattr(function, "_torchdynamo_disable", False)


def holds_compiled_code(model: nn.Module) -> bool:
    """Return whether ``torch.compile`` or ``Module.compile`` compiled the model or a module in it."""
    return any(
        module._compiled_call_impl is not None or is_compiled(module.forward)
        for module in model.modules()
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
        ValueError: If there is such a parameter.
    """
    known_ids = set(map(id, known))
    foreign = [tuple(getattr(p, "shape", ())) for p in owned if id(p) not in known_ids]
    if foreign:
        raise ValueError(
            f"optimizer holds {len(foreign)} parameter(s) that are not in the model, so their gradients could "
            f"not be clipped; the first has shape {foreign[0]}. Build it from model.parameters()."
        )


def refuse_hooks(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse hooks on gradients of parameters and modules, because they would silently not run.

    Raises:
        NotPerSampleError: If there is such a hook.
    """
    for name, parameter in parameters:
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise NotPerSampleError(
                f"parameter {name!r} has a gradient hook, which cannot run: its gradient exists per sample, and then "
                "only clipped and with noise in .grad. Remove the hook; change .grad in a step hook "
                "(register_step_pre_hook), which runs after the noise."
            )
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            name = next(name for name, other in model.named_modules() if other is module)
            raise NotPerSampleError(
                f"module {name or type(module).__name__!r} has a backward hook, which would see the gradients of all "
                "samples at once instead of one sample's. Remove it; change values in the forward pass instead."
            )


def refuse_batch_norm(model: nn.Module) -> None:
    """Refuse BatchNorm in training mode before it updates its buffers.

    Raises:
        NotPerSampleError: If there is such a layer.
    """
    names = [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if names:
        listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        raise batch_norm_error(f"in training mode ({listed})")


def parameters_to_train(
    model: nn.Module, owned: Sequence[Tensor]
) -> tuple[tuple[str, nn.Parameter], ...]:
    """Return the optimizer's parameters that require grad, in the model's order, after checks of the model.

    Args:
        model: The model.
        owned: All parameters of the optimizer.

    Raises:
        ValueError: If a parameter is not the model's, or no parameter requires grad.
        NotPerSampleError: If the model has BatchNorm in training mode, or hooks on gradients.
    """
    named = list(model.named_parameters())
    refuse_foreign_parameters(owned, (p for _, p in named))
    owned_ids = set(map(id, owned))
    selection = tuple((name, p) for name, p in named if id(p) in owned_ids and p.requires_grad)
    if not selection:
        raise ValueError(
            "optimizer holds no parameter of the model that requires grad; there is nothing to train. "
            "Switch gradients on for some of them before: parameter.requires_grad_()."
        )
    refuse_batch_norm(model)
    refuse_hooks(model, selection)
    return selection
