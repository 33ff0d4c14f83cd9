"""Test that ``DPTrainer`` refuses a loss that depends on padding: one sample's length would change the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.dp_tools import plan_of
from tests.integrations.language import gpt2, model_loss
from tests.nightly import chosen

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from clipgrad.integrations.huggingface import DPTrainer
from tests.integrations.test_huggingface import arguments, assert_close, trained


def ragged(count: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [3 + number % 4 for number in range(count)]
    return [{"input_ids": torch.randint(1, 31, (n,), generator=generator)} for n in lengths]


def padded(
    rows: list[dict[str, Any]], *, label: int = -100, left: bool = False, mask: bool = False
) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        ids = row["input_ids"]
        missing = longest - len(ids)
        ends = (missing, 0) if left else (0, missing)
        columns["input_ids"].append(nn.functional.pad(ids, ends))
        columns["labels"].append(nn.functional.pad(ids, ends, value=label))
        columns["attention_mask"].append(nn.functional.pad(torch.ones_like(ids), ends))
    if not mask:
        del columns["attention_mask"]
    return {name: torch.stack(column) for name, column in columns.items()}


def drawn(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padded(rows)
    batch["labels"] = batch["labels"].where(torch.rand(batch["labels"].shape) < 0.5, -100)
    batch["labels"][:, 1] = batch["input_ids"][:, 1]
    return batch


def to_one_length(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    whole = [*rows, {"input_ids": torch.ones(9, dtype=torch.int64)}]
    return {name: column[:-1] for name, column in padded(whole, label=0).items()}


COLLATORS: dict[str, tuple[Callable[..., Any], bool]] = {
    "labels of padding count": (lambda rows: padded(rows, label=0), False),
    "positions are counted from the left": (lambda rows: padded(rows, left=True), False),
    "positions with a mask": (lambda rows: padded(rows, left=True, mask=True), False),
    "on the right": (padded, True),
    "on the right with a mask": (lambda rows: padded(rows, mask=True), True),
    "random labels": (drawn, True),
    "one length": (to_one_length, True),
}


@pytest.mark.parametrize("name", chosen(COLLATORS, {"labels of padding count", "random labels"}))
def test_a_loss_that_depends_on_padding_is_refused(name: str, tmp_path: Path) -> None:
    """The longest sample of a batch decides how far the others are padded, and so it would change their gradients."""
    collator, is_private = COLLATORS[name]
    model = gpt2()
    model.train()
    before = trained(model)
    trainer = DPTrainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=ragged(), data_collator=collator, plan=plan_of(1)
    )  # fmt: skip
    if not is_private:
        with pytest.raises(ValueError, match="if the sample is padded to the length of another"):
            trainer.train()
        assert_close(trained(model), before)
        return
    trainer.train()
    assert model.training
    assert trainer.ledger.steps == 1


def test_the_gradient_does_depend_on_the_padding_that_is_refused() -> None:
    model, rows = gpt2(), ragged()
    for name, (collator, is_private) in COLLATORS.items():
        if name == "random labels":
            continue
        beside = [
            oracle.per_sample_gradients(model, model_loss, (collator(rows[:count]),))
            for count in (1, 4)
        ]
        changes = [float((beside[0][n][0] - beside[1][n][0]).abs().max()) for n in beside[0]]
        assert (max(changes) < 1e-12) == is_private, name
