"""Audit trainings with correlated noise: the bound of a sound sampler is below the claim, that of a bad one above.

``pytest -s tests/test_audit_correlated.py`` prints the figures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from clipgrad import BandedFactorisation, DPOptimizer, PrivacyPlan, SeededNoise, poisson_loader
from clipgrad.audit import Canaries, lower_bound
from clipgrad.sampling._groups import Groups
from tests.audit_tools import FEATURES, Planted, loss_fn
from tests.factorisation.oracle import matrix
from tests.nightly import every

CANARIES, STEPS, BANDS, NOISE, DELTA = 4000, 32, 8, 2.0, 1e-5


def train(seed: int) -> tuple[PrivacyPlan, NDArray[np.float64], NDArray[np.int32], Canaries]:
    """Train on canaries alone. A batch holds a whole group, which gives a Gaussian mechanism and the tightest audit.

    Returns:
        The plan, the noisy sums of each canary's coordinate ``[steps, canaries]``, each canary's group, the coin flips.
    """
    generator = np.random.default_rng(seed)
    canaries = Canaries(np.arange(CANARIES), generator.random(CANARIES) < 0.5)
    kept = torch.from_numpy(np.flatnonzero(canaries.included))
    plan = PrivacyPlan(
        num_samples=len(kept),
        expected_batch_size=len(kept) / BANDS,
        steps=STEPS,
        delta=DELTA,
        noise_multiplier=NOISE,
        mechanism=BandedFactorisation(BANDS, "square_root"),
    )
    batches = poisson_loader(
        TensorDataset(kept, torch.zeros(len(kept), FEATURES)),
        plan=plan,
        generator=torch.Generator().manual_seed(seed),
    )
    model = Planted(CANARIES)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        model,
        loss_fn,
        plan=plan,
        noise=SeededNoise(torch.Generator().manual_seed(seed + 1)),
    )
    seen = []
    for rows, x in batches:
        optimizer.backward(rows, x)
        optimizer.step()
        gradient = model.table.weight.grad
        assert gradient is not None
        seen.append(gradient[:CANARIES, 0].double().numpy() * plan.expected_batch_size)
        optimizer.zero_grad()
    # Canaries that are left out get random groups.
    groups = generator.integers(0, BANDS, CANARIES, dtype=np.int32)
    groups[kept.numpy()] = batches.batch_sampler.state_dict()["groups"].numpy()
    return plan, np.stack(seen), groups, canaries


def audited(name: str, seed: int, takes_part: Callable[[int, int], bool]) -> tuple[float, float]:
    """Return claim and bound for an adversary who inverts the correlation and knows each canary's group."""
    plan, seen, groups, canaries = train(seed)
    assert plan.mechanism is not None
    strategy = matrix(plan.mechanism.first_column(STEPS), STEPS)
    shifts = np.array(
        [
            strategy @ [float(takes_part(step, group)) for step in range(STEPS)]
            for group in range(BANDS)
        ]
    )
    directions = shifts / np.linalg.norm(shifts, axis=1, keepdims=True)
    scores = np.einsum("ct,tc->c", directions[groups], strategy @ seen)
    result = lower_bound(scores, canaries.included, delta=DELTA, curve="gaussian")
    print(f"\n{name:28} claim {plan.epsilon():.2f}  {result}")
    return plan.epsilon(), result.epsilon


@pytest.mark.parametrize("seed", every(3, range(3)))
def test_a_sound_training_stays_below_its_claim(seed: int) -> None:
    claim, found = audited("sound, correlated", seed, lambda step, group: step % BANDS == group)
    assert claim / 3 < found <= claim


def test_a_turn_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug is a sampler that uses each group in every second step instead of every eighth."""

    def too_early(groups: Groups, step: int) -> NDArray[np.int64]:
        return np.flatnonzero(groups.group % 2 == step % 2)

    monkeypatch.setattr(Groups, "of_step", too_early)
    claim, found = audited("a turn too early", 0, lambda step, group: step % 2 == group % 2)
    assert found > claim
