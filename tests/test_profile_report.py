"""The table of a profile, and the command that prints it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad import DPOptimizer
from clipgrad._phases import PHASES
from clipgrad.profile import StepProfile
from clipgrad.profile import __main__ as command
from tests.dp_tools import data, mlp, private

PROFILE = StepProfile(
    phases=dict(zip(PHASES, (0.005, 0.004, 0.003, 0.001, 0.002, 0.0015, 0.0025, 0.001), strict=True)),
    standard_phases={"forward": 0.005, "backward": 0.006, "optimizer": 0.001},
    clipped=0.0195,
    standard=0.012,
    batch_size=32,
    microbatch_size=None,
    device="cpu",
    threads=2,
    rounds=10,
)  # fmt: skip


def test_table() -> None:
    assert str(PROFILE).split("\n") == [
        "phase                 clipped  share  standard  extra",
        "--------------------  -------  -----  --------  -----",
        "forward                  5.00   25 %      5.00   0.00",
        "backward                 4.00   20 %      6.00  -2.00",
        "per-sample gradients     3.00   15 %         -   3.00",
        "norms                    1.00    5 %         -   1.00",
        "contraction              2.00   10 %         -   2.00",
        "bookkeeping              1.50    8 %         -   1.50",
        "noise                    2.50   12 %         -   2.50",
        "optimizer                1.00    5 %      1.00   0.00",
        "--------------------  -------  -----  --------  -----",
        "all phases              20.00  100 %     12.00   8.00",
        "whole step              19.50            12.00   7.50",
        "milliseconds, medians of 10 interleaved steps of each kind; batch of 32 without microbatches, cpu, 2 threads",
        "the clipped step takes 1.62 times as long as the standard one: 62 % of its speed",
    ]


def test_table_of_a_device_that_was_waited_for() -> None:
    text = str(dataclasses.replace(PROFILE, device="cuda:0", microbatch_size=8))
    assert "in microbatches of 8, cuda:0" in text
    assert "wait for cuda:0 at every boundary" in text.split("\n")[-1]


def test_as_dict_is_json() -> None:
    read = json.loads(json.dumps(PROFILE.as_dict()))
    assert read.pop("ratio") == PROFILE.ratio == pytest.approx(1.625)
    assert StepProfile(**read) == PROFILE


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROFILE.clipped = 0.0  # type: ignore[misc]


def make() -> tuple[DPOptimizer, tuple[Tensor]]:
    return private(mlp(dtype=torch.float32)), (data(dtype=torch.float32),)


def make_wrong() -> Any:
    return private(mlp()), data()


HERE = __name__


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([f"{HERE}:make", "--rounds", "2", "--warm-up", "1"])
    text = capsys.readouterr().out
    assert text.startswith("phase ")
    assert "medians of 2 interleaved steps" in text
    assert "batch of 5 without microbatches, cpu" in text


def test_command_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--rounds", "1", "--device", "cpu"])
    text = capsys.readouterr().out
    assert text.startswith("This is an example")
    assert "batch of 32" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["make"], "'make' is not of the form module:factory, such as train:make"),
        (["no_such_module:make"], "no module 'no_such_module' here"),
        ([f"{HERE}:no_such"], "has no function 'no_such'"),
        ([f"{HERE}:make_wrong"], "must return (optimizer, batch)"),
        ([f"{HERE}:make_wrong"], "it returned (DPOptimizer, Tensor)"),
        ([f"{HERE}:data"], "it returned Tensor"),
        (["--rounds", "0"], "must be an integer of at least 1, got '0'"),
        (["--warm-up", "few"], "must be an integer of at least 0, got 'few'"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
    ],
)
def test_command_refuses(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_help_shows_a_factory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert "python -m clipgrad.profile train:make" in capsys.readouterr().out
