"""``DPTrainer`` on two processes trains as on one: steps, ledger, schedule, checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import trainer_cases as cases
from tests.distributed.cases import shard_root
from tests.distributed.conftest import Pool
from tests.distributed.test_replicated import largest_difference

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.mark.nightly
@pytest.mark.parametrize("resumed", [False, True])
def test_two_processes_train_as_one(pool: Pool, tmp_path: Path, resumed: bool) -> None:
    expected = cases.train(0, 1, str(tmp_path / "one"))
    folder = str(tmp_path / "two")
    if resumed:
        assert pool(2).run(cases.train, folder, 3) == [{"steps": 3}] * 2
    first, second = pool(2).run(cases.train, folder, None, resumed)
    for found in (first, second):
        assert largest_difference(found["parameters"], expected["parameters"]) < 1e-9
        assert found["wrapped"] == "GPT2LMHeadModel"  # and not DDP
        assert found["steps"] == cases.STEPS
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)
    assert first["ledger"] == second["ledger"]
    rates, losses = (
        [[log[name] for log in run["log"] if "learning_rate" in log] for run in (first, expected)]
        for name in ("learning_rate", "loss_not_private")
    )
    assert rates[0] == pytest.approx(rates[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.nightly
def test_poisson_batches_are_counted_once(pool: Pool, tmp_path: Path) -> None:
    first, second = pool(2).run(cases.train, str(tmp_path), None, False, True)
    assert first["ledger"] == second["ledger"]
    assert first["steps"] == cases.STEPS
    assert first["epsilon"] == pytest.approx(
        cases.plan_of(cases.STEPS, num_samples=48, noise_multiplier=1.0).epsilon(), rel=1e-9
    )
    assert first["seen"] != second["seen"]
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name])


@pytest.mark.nightly
def test_a_model_of_fully_shard_is_refused(pool: Pool, tmp_path: Path) -> None:
    for good, error in pool(2).outcomes(cases.train, str(tmp_path), None, False, False, shard_root):
        assert not good
        assert error[0] == "ValueError", error[2]
        assert "the model has DTensor parameters, whose mesh spreads the model" in error[1]


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_accelerates_own_ways_of_spreading_a_model_are_refused(name: str) -> None:
    from clipgrad.integrations._huggingface_arguments import refuse_spread_model

    def trainer(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            is_fsdp_enabled=name == "FSDP",
            is_deepspeed_enabled=name == "DeepSpeed",
            model=torch.nn.Linear(1, 1),
        )

    refuse_spread_model(trainer("none"))
    with pytest.raises(ValueError, match=f"accelerate is set to {name}, which spreads the model"):
        refuse_spread_model(trainer(name))
