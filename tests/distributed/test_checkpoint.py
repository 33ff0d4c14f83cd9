"""Test runs that continue with another number of ranks and the same budget, and errors that name a lost rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipgrad import DPOptimizer, RunState, SeededNoise
from tests.distributed import cases
from tests.distributed import checkpoint_cases as checkpoints
from tests.distributed.conftest import Pool
from tests.distributed.processes import Processes
from tests.distributed.test_replicated import largest_difference

Shard = Callable[[nn.Module], None] | None


@pytest.mark.parametrize(
    "shard",
    [
        pytest.param(None, id="replicated", marks=pytest.mark.nightly),
        pytest.param(cases.shard_root, id="fsdp2"),
    ],
)
def test_one_and_two_ranks_go_on_from_each_other(pool: Pool, tmp_path: Path, shard: Shard) -> None:
    """Parameters, moments, position and budget equal those of a run that never stopped."""
    whole = checkpoints.run(0, 1, str(tmp_path / "whole"), checkpoints.STEPS)
    folder = str(tmp_path / "parts")
    found: dict[str, Any] = checkpoints.run(0, 1, folder, 2)
    for until, resumed in ((5, True), (8, True)):
        both = pool(2).run(checkpoints.run, folder, until, shard)
        found = both[0]
        assert both[1]["ledger"] == found["ledger"]
        assert found["resumed"] is resumed
        assert found["taken"] == 3
    assert largest_difference(found["parameters"], whole["parameters"]) < 1e-6
    assert found["epsilon"] == whole["epsilon"]
    # The last checkpoint of two ranks is the finished run of one, which has no step left.
    rest = checkpoints.run(0, 1, folder, checkpoints.STEPS)
    assert (rest["resumed"], rest["taken"], rest["ledger"]) == (True, 0, found["ledger"])
    assert largest_difference(rest["parameters"], found["parameters"]) == 0
    for good, error in pool(2).outcomes(checkpoints.beyond, folder):
        assert not good
        assert error[0] == "PrivacyBudgetError", error[2]


def test_a_restart_repeats_no_noise(pool: Pool, tmp_path: Path) -> None:
    """Two restarts take the same step after the same checkpoint, and draw different noise."""
    import shutil

    pool(2).run(checkpoints.run, str(tmp_path / "a"), 2, None, 1.0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, _ = pool(2).run(checkpoints.run, str(tmp_path / "a"), 3, None, 1.0)
    second, _ = pool(2).run(checkpoints.run, str(tmp_path / "b"), 3, None, 1.0)
    assert first["ledger"] == second["ledger"]
    for name, value in first["parameters"].items():
        assert not torch.equal(value, second["parameters"][name])


def test_an_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    checkpoints.run(0, 1, str(tmp_path), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    (tmp_path / ".step-3.part").mkdir()
    assert checkpoints.run(0, 1, str(tmp_path), 3)["taken"] == 1


@pytest.mark.nightly
def test_torchrun_restarts_lose_and_repeat_no_step(tmp_path: Path) -> None:
    """A rank dies after its fifth step, before the checkpoint, and ``torchrun`` starts all ranks again."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--max-restarts=1", "-m", "tests.distributed.restarted", str(tmp_path / "run"), str(tmp_path / "died"),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or a restarted rank may connect to one that died
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    found = torch.load(tmp_path / "run" / "found.pt")
    assert (found["resumed"], found["taken"]) == (True, 4)
    whole = checkpoints.run(0, 1, str(tmp_path / "whole"), checkpoints.STEPS)
    assert found["epsilon"] == whole["epsilon"]
    assert largest_difference(found["parameters"], whole["parameters"]) < 1e-6


def test_generators_are_not_saved() -> None:
    model = nn.Linear(2, 1)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        cases.squares,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        noise=SeededNoise(torch.Generator()),
    )
    with pytest.raises(ValueError, match="RunState cannot save a generator"):
        RunState(model, optimizer)


@pytest.mark.parametrize(
    ("fault", "shard", "call"),
    [
        pytest.param("dies", None, "step 2", marks=pytest.mark.nightly),
        pytest.param("dies within", None, "step 2", marks=pytest.mark.nightly),
        pytest.param("stalls", None, "step 2", marks=pytest.mark.nightly),
        pytest.param("stalls within", None, "step 2", marks=pytest.mark.nightly),
        ("dies", cases.shard_root, "backward 2"),
        pytest.param(
            "stalls in the loss", cases.shard_root, "backward 2", marks=pytest.mark.nightly
        ),
        pytest.param(
            "stalls in the loss", cases.shard_layers, "backward 2", marks=pytest.mark.nightly
        ),
    ],
)
def test_a_lost_rank_ends_the_run_with_the_step(fault: str, shard: Shard, call: str) -> None:
    processes = Processes(2, timeout=20)
    try:
        good, found = processes.outcome_of_first(checkpoints.step_with_fault, fault, 2, shard)
    finally:
        processes.close()
    assert good, found
    error, untouched, steps = found
    assert error.startswith(f"{call}: rank 0 of 2 could not reach the other ranks"), error
    assert untouched
    # The ledger counts every step that may have been released.
    assert steps == (3 if fault.endswith("within") else 2)
