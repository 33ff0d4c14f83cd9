"""Check arguments; messages name the argument, its value and the remedy."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr

_PLAIN = (str, bytes, bool, int, float, complex)


def number(name: str, value: object) -> float:
    """Return a real number; refuse a bool, a string or a list."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return float(value)


def flag(name: str, value: bool) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return value


def positive(name: str, value: float) -> float:
    value = number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}.")
    return value


def microbatch_size(value: int | str | None) -> None:
    if value is None or value == "auto" or (type(value) is int and value >= 1):
        return
    raise ValueError(
        "microbatch_size must be a positive integer, or None for the whole batch, or 'auto' for what fits into memory, "
        f"got {value!r}."
    )


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


@functools.lru_cache(maxsize=64)
def argument_positions(
    argnums: tuple[int, ...], batch_argnums: tuple[int, ...] | None, count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions of parameters and of batch arguments among ``count`` arguments; -1 is the last."""

    def absolute(name: str, numbers: Sequence[int]) -> tuple[int, ...]:
        for number in numbers:
            if not -count <= number < count:
                raise ValueError(
                    f"{name}={tuple(numbers)} does not fit a call with {count} positional arguments."
                )
        return tuple(number % count for number in numbers)

    parameters = absolute("argnums", argnums)
    if batch_argnums is None:
        batch = tuple(i for i in range(count) if i not in parameters)
    else:
        batch = absolute("batch_argnums", batch_argnums)
    if not batch:
        raise ValueError(
            "no batch argument: pass the batch after the parameters, tensors whose first axis is the batch "
            f"(argnums={tuple(argnums)} takes all of the {count} positional arguments)."
        )
    both = (*parameters, *batch)
    if len(set(both)) < len(both):
        raise ValueError(
            f"argnums={parameters} and batch_argnums={batch} name an argument twice; an argument is either "
            "parameters or batch."
        )
    return parameters, batch


def require_dense(
    what: str, leaves: Sequence[Any], find_paths: Callable[[], Sequence[Any]]
) -> None:
    """Refuse sparse and nested tensors, which have no batch axis that ``vmap`` can hide.

    ``what`` is ``"batch"`` or ``"params"``, and ``find_paths`` returns the path of each leaf, for the message.
    """
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (leaf.layout is not torch.strided or leaf.is_nested):
            layout = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            remedy = "torch.nested.to_padded_tensor(x, 0.0)" if leaf.is_nested else "x.to_dense()"
            raise ValueError(
                f"{what}{keystr(find_paths()[index])} is a {layout} tensor, and vmap cannot split it into samples. "
                f"Pass an ordinary tensor: {remedy}."
            )


def batch_size(leaves: Sequence[Any], find_paths: Callable[[], Sequence[str]]) -> int:
    """Return the common leading size of all tensors of a batch."""
    if leaves and all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        found = {leaf.shape[0] for leaf in leaves}
        if len(found) == 1:
            return int(found.pop())
    paths = find_paths()
    for leaf, path in zip(leaves, paths, strict=True):
        if not isinstance(leaf, Tensor) and _may_hold_samples(leaf):
            remedy = "Convert it with torch.as_tensor"
            if not hasattr(leaf, "shape"):
                remedy = "Pass tensors in dicts, lists and tuples (such as dict(batch)), and constants by closure"
            raise ValueError(
                f"batch argument {path} is {type(leaf).__name__}, not a tensor: every sample would see all of it. "
                f"{remedy}."
            )
    sizes = {
        path: leaf.shape[0] if leaf.dim() else None
        for leaf, path in zip(leaves, paths, strict=True)
        if isinstance(leaf, Tensor)
    }
    if not sizes:
        raise ValueError(
            "the batch holds no tensor, so it has no batch size; pass the samples as tensors whose first axis "
            "is the batch."
        )
    scalars = [path for path, size in sizes.items() if size is None]
    if scalars:
        raise ValueError(
            f"batch argument {scalars[0]} is a scalar tensor and has no batch axis; pass constants as Python "
            "numbers, or close over them in the loss."
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise ValueError(
            f"batch arguments disagree about the batch size ({listed}); their first axes must match."
        )
    return int(next(iter(sizes.values())) or 0)


def _may_hold_samples(leaf: Any) -> bool:
    """Return whether an object that is neither a tensor nor a pytree container may hold several values."""
    if isinstance(leaf, (*_PLAIN, type, nn.Module)) or getattr(leaf, "shape", None) == ():
        return False
    if hasattr(leaf, "__len__") or hasattr(leaf, "__iter__"):
        return True
    return any(isinstance(value, Tensor) for value in getattr(leaf, "__dict__", {}).values())


def refuse_python_samples(arguments: Sequence[Any], size: int) -> None:
    """Refuse a list with one Python value per sample: every sample would see the whole list."""
    stack = [argument for argument in arguments if not isinstance(argument, Tensor)]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            if len(value) == size > 1 and all(map(_is_plain, value)):
                raise ValueError(
                    f"the batch holds a {type(value).__name__} of {size} Python values ({value[0]!r}, ...), apparently "
                    "one per sample, but every sample would see all of them. Pass a tensor: torch.as_tensor(...); "
                    "close over constants in the loss."
                )
            stack.extend(value)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a plain Python value, or a container of such values: it has no batch axis."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def require_differentiable(params: Sequence[Tensor], batch: Sequence[Any]) -> None:
    """Refuse inference mode and inference tensors with a clear message, since autograd cannot record them."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "a gradient is computed under torch.inference_mode(), which switches autograd off; leave it, or use "
            "torch.no_grad(), which is allowed here."
        )
    tensors = [leaf for leaf in batch if isinstance(leaf, Tensor)]
    if any(map(Tensor.is_inference, params)) or any(map(Tensor.is_inference, tensors)):
        raise ValueError(
            "a parameter or batch tensor was made under torch.inference_mode(), so autograd cannot use it; clone it "
            "outside."
        )


def padding_mask(mask: Tensor | None, size: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"is_padding must be a boolean tensor of shape ({size},), got {type(mask).__name__}. Convert it with "
            "torch.as_tensor(is_padding, dtype=torch.bool)."
        )
    if mask.dtype is not torch.bool or mask.shape != (size,):
        raise ValueError(
            f"is_padding must be a boolean tensor of shape ({size},), got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    return mask


def accumulate_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"accumulate_dtype must be a torch.dtype, such as torch.float32, got {dtype!r}."
        )
    if not dtype.is_floating_point or dtype.itemsize < 4:
        raise ValueError(
            f"accumulate_dtype must be a floating-point dtype of at least 32 bits, got {dtype}: rounding to fewer bits "
            "can change a sum by more than its sensitivity."
        )
    return dtype
