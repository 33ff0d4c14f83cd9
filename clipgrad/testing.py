"""For authors of rules: describe a use of an operation, and have it compared with the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RuleCase:
    """One way to call an operation that has a rule.

    Attributes:
        rule: The rule's name in the registry.
        name: What is special about this case.
        loss: ``loss(params, *batch) -> scalar``; sees a batch of one.
        params: Makes the parameters, float64, by name. Called after seeding.
        batch: From a batch size to the batch arguments. Called after seeding.
    """

    rule: str
    name: str
    loss: Callable[..., Tensor]
    params: Callable[[], dict[str, Tensor]]
    batch: Callable[[int], tuple[Any, ...]]
