"""``check_collation`` finds batches in which one sample changes the gradient of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clipgrad import DPOptimizer
from clipgrad.sampling import check_collation

TEXTS = [torch.randint(1, 9, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 7, 5)]


class Reader(nn.Module):
    """A sum over tokens whose values depend on their positions, which are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(9, 4), nn.Embedding(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        seen = self.token(ids) * self.position(torch.arange(ids.shape[1]))
        return self.drop(seen).sum(-1).tanh()


def padded(side: str) -> Callable[[list[Tensor]], Tensor]:
    return lambda rows: pad_sequence(rows, batch_first=True, padding_side=side)


def masked(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).where(ids > 0, 0.0).sum() / (ids > 0).sum()


def unmasked(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).mean()


def fixed(rows: list[Tensor]) -> Tensor:
    return torch.stack([nn.functional.pad(row, (8 - len(row), 0)) for row in rows])


@pytest.mark.parametrize(
    ("loss", "collate", "leaks"),
    [
        (masked, padded("right"), False),
        (masked, padded("left"), True),
        (unmasked, padded("right"), True),
        (masked, fixed, False),
        (unmasked, fixed, False),
    ],
)
def test_padding(loss: Callable[..., Tensor], collate: Any, leaks: bool) -> None:
    model = Reader()
    model.token.eval()
    if leaks:
        with pytest.raises(ValueError, match=r"sample 0 .* batch of 3 samples .* pad on the right"):
            check_collation(loss, model, TEXTS, collate)
    else:
        check_collation(loss, model, TEXTS, collate)
    assert model.training
    assert model.drop.training
    assert not model.token.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("leaks", [False, True])
def test_a_leak_breaks_the_sensitivity(leaks: bool) -> None:
    """Adding the longest sample moves the sum by more than the clipping norm; that is what the check is for."""
    model = Reader().double().eval()
    collate = padded("left" if leaks else "right")
    sums = []
    short = [TEXTS[0]] * 20
    for rows in (short, [*short, TEXTS[1]]):
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters()),
            model,
            masked,
            max_grad_norm=0.1,
            noise_multiplier=0.0,
            expected_batch_size=1,
        )
        optimizer.backward(collate(rows))
        sums.append(torch.cat([s.flatten() for s in optimizer.clipped_sums.values()]))
    moved = float((sums[1] - sums[0]).norm())
    assert (moved > 2 * 0.1) is leaks
    assert leaks or moved <= 0.1 * (1 + 1e-9)


def test_arguments_by_name_metrics_and_single_samples() -> None:
    rows = [{"ids": text, "name": "a text"} for text in TEXTS]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = padded("right")([row["ids"] for row in rows])
        return {"ids": ids, "name": [row["name"] for row in rows]}

    def loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return masked(model, ids[None]), {"length": ids.sum()}

    check_collation(loss, Reader(), rows, collate, keep_batch_dim=False)


def test_one_sample_shows_nothing() -> None:
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        check_collation(masked, Reader(), TEXTS[:1], padded("right"))
