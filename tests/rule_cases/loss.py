"""Losses that run once on all samples: every reduction, targets to ignore, what is left to the fallback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
CLASSES = 4


def cross_entropy(
    name: str,
    *shape: int,
    ignored: int = 0,
    per_sample: Callable[..., Tensor] | None = None,
    declines: bool = False,
    **options: Any,
) -> RuleCase:
    """Logits ``[1, C, *shape]`` of a sample; of the targets, ``ignored`` have class 2, the others never."""

    def loss(p: Params, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.einsum("nk...,kc->nc...", x, p["w"])
        found = (per_sample or F.cross_entropy)(logits, y, **options)
        return found if found.dim() == 0 else (found * found.cos()).sum()

    def batch(size: int) -> tuple[Tensor, Tensor]:
        targets = torch.randint(CLASSES, (size, *shape))
        targets[targets == 2] = 1
        if ignored:
            targets.view(size, -1)[:, :ignored] = 2
        return torch.randn(size, 3, *shape, dtype=torch.float64), targets

    return RuleCase(
        "cross_entropy",
        name,
        loss,
        lambda: {"w": torch.randn(3, CLASSES, dtype=torch.float64)},
        batch,
        declines,
    )


def unbatched(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits[0], y[0])


def tokens_as_rows(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), y.flatten(), **options)


def elementwise(
    function: Callable[..., Tensor],
    name: str,
    *,
    target: Callable[[Tensor], Tensor] = torch.sigmoid,
    declines: bool = False,
    **options: Any,
) -> RuleCase:
    def loss(p: Params, x: Tensor, y: Tensor) -> Tensor:
        found = function(x @ p["w"], target(y), **options)
        return found if found.dim() == 0 else (found * found.cos()).sum()

    return RuleCase(
        function.__name__,
        name,
        loss,
        lambda: {"w": torch.randn(3, CLASSES, dtype=torch.float64)},
        lambda size: (
            torch.randn(size, 5, 3, dtype=torch.float64),
            torch.randn(size, 5, CLASSES, dtype=torch.float64),
        ),
        declines,
    )


def learned_target(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(x @ p["w"], (y * p["scale"]).tanh())


def scalar_each(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss((x @ p["w"]).sum(), y.sum())


def target_of_no_sample(y: Tensor) -> Tensor:
    return torch.linspace(0, 1, 5 * CLASSES, dtype=y.dtype).view(1, 5, CLASSES)


def mse(name: str, loss: Callable[..., Tensor]) -> RuleCase:
    return RuleCase(
        "mse_loss",
        name,
        loss,
        lambda: {
            "w": torch.randn(3, CLASSES, dtype=torch.float64),
            **(
                {"scale": torch.randn(CLASSES, dtype=torch.float64)}
                if loss is learned_target
                else {}
            ),
        },
        lambda size: (
            torch.randn(size, 5, 3, dtype=torch.float64),
            torch.randn(size, 5, CLASSES, dtype=torch.float64),
        ),
    )


ELEMENTWISE = (F.mse_loss, F.l1_loss, F.binary_cross_entropy_with_logits)
CASES = [
    cross_entropy("plain"),
    cross_entropy("one sample without a batch axis", per_sample=unbatched),
    cross_entropy("sum", reduction="sum"),
    cross_entropy("none", reduction="none"),
    cross_entropy("pixels", 3, 2),
    cross_entropy("pixels, some ignored", 3, 2, ignored=4, ignore_index=2),
    cross_entropy("pixels, sum, some ignored", 3, 2, ignored=4, ignore_index=2, reduction="sum"),
    cross_entropy("pixels, none, some ignored", 5, ignored=3, ignore_index=2, reduction="none"),
    cross_entropy("tokens as rows", 6, per_sample=tokens_as_rows),
    cross_entropy("tokens as rows, some ignored", 6, ignored=2, ignore_index=2, per_sample=tokens_as_rows),
    cross_entropy("weights of classes", declines=True, weight=torch.rand(CLASSES, dtype=torch.float64)),
    cross_entropy("smoothed", declines=True, label_smoothing=0.1),
    *(elementwise(f, "plain") for f in ELEMENTWISE),
    *(elementwise(f, "sum", reduction="sum") for f in ELEMENTWISE),
    *(elementwise(f, "none", reduction="none") for f in ELEMENTWISE),
    *(elementwise(f, "target of no sample", target=target_of_no_sample, declines=True) for f in ELEMENTWISE),
    elementwise(
        F.binary_cross_entropy_with_logits, "weights of labels", declines=True,
        pos_weight=torch.rand(CLASSES, dtype=torch.float64),
    ),
    mse("learned target", learned_target),
    mse("a number each", scalar_each),
]  # fmt: skip


__all__ = ["CASES"]
