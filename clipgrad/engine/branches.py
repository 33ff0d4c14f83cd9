"""Read per-sample values as Python numbers, and report samples that would take different branches.

``if mask.all():`` reads one value for a whole microbatch, but each sample has its own. While the values agree, the
microbatch runs on. If they differ, it is split by value and each part runs separately. So every sample takes exactly
the branch that it would take alone, and the result is still the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from clipgrad._functorch import Decline, below_vmap, expose_batch_axis

# Each way to read a value, with its conversion; ``tolist`` and NumPy conversions stay refused.
_READS: MappingProxyType[Callable[..., Any], Callable[[Any], Any]] = MappingProxyType(
    {
        torch.Tensor.__bool__: bool,
        torch.Tensor.__int__: int,
        torch.Tensor.__float__: float,
        torch.Tensor.__index__: int,
        torch.Tensor.item: lambda value: value,
    }
)


class Disagreement(Exception):
    """This exception reports that a value which the loss reads differs between samples.

    Attributes:
        agree: Boolean ``[B]``, on the CPU: the samples whose value equals that of the first sample.
    """

    def __init__(self, agree: Tensor) -> None:
        super().__init__("samples of one microbatch take different branches")
        self.agree = agree

    def parts(self) -> list[Tensor]:
        """Return the indices of the samples that agree with the first sample, and of the others."""
        return [self.agree.nonzero()[:, 0], (~self.agree).nonzero()[:, 0]]


def is_read(function: Callable[..., Any]) -> bool:
    """Return whether a function reads the value of a tensor as a Python number."""
    return function in _READS


def read(function: Callable[..., Any], tensor: Tensor, level: int) -> Any:
    """Return the value of ``function(tensor)`` on which all samples agree; ``is_read(function)`` must hold.

    Raises:
        Decline: If the tensor has no batch axis, so that all samples share it.
        Disagreement: If the values differ.
    """
    value = expose_batch_axis(tensor, level)
    if value is None:
        raise Decline
    convert = _READS[function]
    with below_vmap():
        answers = [convert(answer) for answer in value.detach().reshape(value.shape[0]).tolist()]
        same = [answer == answers[0] or answer is answers[0] for answer in answers]
        if all(same):
            return answers[0]
        raise Disagreement(torch.tensor(same, device="cpu"))
