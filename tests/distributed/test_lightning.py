"""``DPModule`` on two processes trains as on one: steps, ledger, schedule, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import lightning_cases as cases
from tests.distributed.conftest import Pool
from tests.distributed.test_replicated import largest_difference

pytest.importorskip("lightning.pytorch")
# To import Lightning in three processes takes seconds.
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


def test_two_processes_train_as_one(pool: Pool, tmp_path: Path) -> None:
    expected = cases.fit(0, 1, str(tmp_path / "one"))
    runs = {
        "whole": pool(2).run(cases.fit, str(tmp_path / "two")),
        "first half": pool(2).run(cases.fit, str(tmp_path / "halves"), 2),
        "resumed": pool(2).run(cases.fit, str(tmp_path / "halves"), cases.STEPS, True),
    }
    for name in ("whole", "resumed"):
        first, second = runs[name]
        assert first["ledger"] == second["ledger"]
        for found in (first, second):
            assert largest_difference(found["parameters"], expected["parameters"]) < 1e-9
            assert found["steps"] == found["ledger steps"] == cases.STEPS
            assert found["wrapped"] == "Classifier"  # and not DDP
    for found in runs["first half"]:
        assert found["ledger steps"] == 2


def test_lightnings_own_strategies_are_refused(pool: Pool, tmp_path: Path) -> None:
    for good, error in pool(2).outcomes(cases.fit, str(tmp_path), cases.STEPS, False, "ddp"):
        assert not good
        assert error[0] == "ValueError", error[2]
        assert "is a DDPStrategy for 2 processes" in error[1]
        assert "ReplicatedStrategy()" in error[1]
