"""All that FSDP2 (``torch.distributed.fsdp.fully_shard``) does not offer as a public function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils._pytree import tree_map


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that ``fully_shard`` was called on, the same order on every rank."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def policy_of(module: FSDPModule) -> MixedPrecisionPolicy:
    """Return the mixed precision policy of a module."""
    return cast(MixedPrecisionPolicy, _state(module)._mp_policy)


@contextmanager
def own_schedule(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """Keep FSDP from gathering, freeing and reducing around the forward and backward pass of the body.

    It would register hooks for the gradients of the whole batch. What its hooks cast is cast here.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    states = [_state(module) for module in modules]
    before = [state._training_state for state in states]
    with ExitStack() as stack:
        try:
            for state in states:
                # The state in which FSDP runs a module again for activation checkpointing: its hooks leave all alone.
                state._training_state = TrainingState.PRE_BACKWARD
            for module in modules:
                _cast(cast(nn.Module, module), policy_of(module), stack)
            yield
        finally:
            for state, kind in zip(states, before, strict=True):
                state._training_state = kind


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()


def _cast(module: nn.Module, policy: MixedPrecisionPolicy, stack: ExitStack) -> None:
    """Cast inputs and outputs of a module as its policy says."""
    handles: list[Any] = []
    if policy.param_dtype is not None and policy.cast_forward_inputs:
        to_inputs = partial(_to, policy.param_dtype)
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (tree_map(to_inputs, args), tree_map(to_inputs, kwargs)),
                with_kwargs=True,
            )
        )
    if policy.output_dtype is not None:
        to_output = partial(_to, policy.output_dtype)
        handles.append(
            module.register_forward_hook(lambda _, __, output: tree_map(to_output, output))
        )
    for handle in handles:
        stack.callback(handle.remove)


def _to(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
