"""Python branches on the values of samples: samples that take the same branch run together.

``if mask.all():`` asks one question of a whole microbatch, but each sample has an answer of its own. While the
answers agree there is nothing to decide. Where they differ, the microbatch is split by answer and each part runs on
its own, so every sample takes exactly the branch that it would take alone: the result is still the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from clipgrad._functorch import Decline, below_vmap, physical

# What each way of reading a value makes of it; ``tolist`` and NumPy conversions stay refused.
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
    """Samples answer a question of the loss differently.

    Attributes:
        agree: Boolean ``[B]``, on the CPU: the samples that answer as the first one does.
    """

    def __init__(self, agree: Tensor) -> None:
        super().__init__("samples of one microbatch take different branches")
        self.agree = agree

    def parts(self) -> list[Tensor]:
        """Indices of the samples on either side."""
        return [self.agree.nonzero()[:, 0], (~self.agree).nonzero()[:, 0]]


def is_read(function: Callable[..., Any]) -> bool:
    """Whether a call asks for the value of a tensor as a Python number."""
    return function in _READS


def read(function: Callable[..., Any], tensor: Tensor, level: int) -> Any:
    """The answer of all samples to ``function(tensor)``.

    Args:
        function: One for which ``is_read`` holds.
        tensor: Its operand, as the loss holds it.
        level: The transform's level.

    Raises:
        Decline: If the tensor does not differ from sample to sample.
        Disagreement: If the answers differ.
    """
    value = physical(tensor, level)
    if value is None:
        raise Decline
    convert = _READS[function]
    with below_vmap():
        answers = [convert(answer) for answer in value.detach().reshape(value.shape[0]).tolist()]
        same = [answer == answers[0] or answer is answers[0] for answer in answers]
        if all(same):
            return answers[0]
        raise Disagreement(torch.tensor(same, device="cpu"))
