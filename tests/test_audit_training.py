"""Audits of real trainings: a sound one stays below its claim, planted bugs rise above it.

``pytest -s tests/test_audit_training.py`` prints the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from clipgrad import DPOptimizer, SeededNoise, accounting, poisson_loader
from clipgrad.audit import AuditResult, Canaries, StepRecorder, canary_losses, lower_bound
from clipgrad.engine import clip_and_sum
from tests.audit_tools import ORDINARY, HalfNoise, ReusedNoise, Setting, repeated, train
from tests.nightly import chosen, every

# Every coin at once, and fewer canaries for what is read step by step.
FULL = Setting(m=50_000, noise_multiplier=4.0, steps=4, delta=1e-7)
GAUSSIAN = Setting(m=4000, noise_multiplier=4.0, steps=16, delta=1e-5)
POISSON = Setting(m=20_000, noise_multiplier=2.0, sample_rate=0.1, steps=50, delta=1e-6)
STEPWISE = Setting(m=1000, noise_multiplier=4.0, sample_rate=0.5, steps=20, delta=1e-6)
# Chosen beforehand, from what a Gaussian of the claimed size would show.
GUESSES = (400, 400)


def told(name: str, setting: Setting, result: AuditResult) -> float:
    print(f"\n{name:28}{result.curve:12} claim {setting.claim:.2f}  {result}")
    return result.epsilon


def audited(
    name: str, setting: Setting, curve: Any = "approximate", guesses: Any = None, **training: Any
) -> float:
    scores, coins, _ = train(setting, **training)
    result = lower_bound(scores, coins, delta=setting.delta, curve=curve, guesses=guesses)
    return told(name, setting, result)


# ------------------------------------------------------------------ a sound training


@pytest.mark.parametrize("seed", every(3, range(3)))
def test_full_batches_stay_below_the_claim(seed: int) -> None:
    setting = Setting(**{**vars(FULL), "seed": seed})
    found = audited("sound, full batches", setting, guesses=GUESSES)
    assert setting.claim / 3 < found <= setting.claim
    if seed == 0:
        assert audited("sound, full batches", setting) <= setting.claim


@pytest.mark.parametrize("seed", every(3, range(3)))
def test_poisson_batches_stay_below_the_claim(seed: int) -> None:
    setting = Setting(**{**vars(POISSON), "seed": seed})
    found = audited("sound, Poisson", setting)
    assert setting.claim / 4 < found <= setting.claim


@pytest.mark.parametrize("seed", every(3, range(3)))
def test_the_gaussian_curve_stays_below_the_claim(seed: int) -> None:
    setting = Setting(**{**vars(GAUSSIAN), "seed": seed})
    found = audited("sound, full batches", setting, curve="gaussian")
    assert setting.claim / 3 < found <= setting.claim


# ------------------------------------------------------------------ planted bugs


def test_half_the_noise_is_caught() -> None:
    noise = HalfNoise(FULL.noise())
    assert audited("half the noise", FULL, guesses=GUESSES, noise=noise) > FULL.claim


def test_half_the_noise_is_caught_with_few_canaries_by_the_gaussian_curve() -> None:
    noise = HalfNoise(GAUSSIAN.noise())
    assert audited("half the noise", GAUSSIAN, curve="gaussian", noise=noise) > GAUSSIAN.claim


@pytest.mark.parametrize("setting", [FULL, POISSON])
def test_a_parameter_that_is_not_clipped_is_caught(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighted_sums = clip_and_sum._weighted_sums

    def leaky(gradients: Any, factors: Sequence[Tensor], settings: Any) -> list[Tensor]:
        sums = weighted_sums(gradients, factors, settings)
        whole = weighted_sums(gradients, [torch.ones_like(f) for f in factors], settings)
        return [whole[0], *sums[1:]]

    monkeypatch.setattr(clip_and_sum, "_weighted_sums", leaky)
    assert audited("one parameter not clipped", setting) > setting.claim


@pytest.mark.parametrize("times", every(2, [25, 50]))
def test_a_batch_that_is_reused_is_caught(times: int) -> None:
    kept = len(POISSON.canaries().training_indices(POISSON.m + ORDINARY))
    batches = repeated(POISSON.batches(kept), times)
    assert audited(f"each batch {times} times", POISSON, batches=batches) > POISSON.claim


@pytest.mark.parametrize("observe", chosen(["parameters", "gradients"], {"parameters"}))
def test_noise_that_is_reused_is_caught_by_looking_at_single_steps(observe: Any) -> None:
    m = STEPWISE.m
    rows, x = (samples[:m] for samples in STEPWISE.samples())

    def spread(name: str, noise: Any) -> float:
        _, coins, recorder = train(
            STEPWISE,
            noise=noise,
            watch=lambda optimizer: StepRecorder(optimizer, rows, x, observe=observe),
        )
        # The same noise in each step cancels between steps; what is left is who was in which batch.
        scores = recorder.products.var(0)
        return told(name, STEPWISE, lower_bound(scores, coins, delta=STEPWISE.delta))

    assert spread("sound, step by step", STEPWISE.noise()) <= STEPWISE.claim
    assert spread("noise reused", ReusedNoise(STEPWISE.noise())) > STEPWISE.claim


# ------------------------------------------------------------------ an ordinary model, from outside


def classification(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def black_box(
    noise_multiplier: float, *, steps: int = 60, lr: float = 0.01
) -> tuple[AuditResult, float]:
    """Digits, of which some have a wrong label and are canaries."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    m, delta = 600, 1e-5
    labels[:m] = torch.randint(10, (m,), generator=torch.Generator().manual_seed(0))
    coins = np.random.default_rng(0).random(m) < 0.5
    canaries = Canaries(np.arange(m), coins)
    kept = Subset(TensorDataset(images, labels), canaries.training_indices(len(images)))
    loader = poisson_loader(
        kept, sample_rate=0.25, steps=steps, generator=torch.Generator().manual_seed(1)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = DPOptimizer(
        torch.optim.Adam(model.parameters(), lr=lr),
        model,
        classification,
        max_grad_norm=1.0,
        noise_multiplier=noise_multiplier,
        expected_batch_size=0.25 * len(images),
        noise=SeededNoise(torch.Generator().manual_seed(2)),
    )
    own = (images[:m], labels[:m])
    before = canary_losses(model, classification, *own)
    for batch in loader:
        optimizer.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
    scores = before - canary_losses(model, classification, *own)
    claim = accounting.epsilon(
        noise_multiplier=noise_multiplier, sample_rate=0.25, steps=steps, delta=delta
    )
    return lower_bound(scores, coins, delta=delta), claim


def test_black_box_stays_below_the_claim() -> None:
    result, claim = black_box(noise_multiplier=2.0)
    print(f"\nblack box: claim {claim:.2f}  {result}")
    assert 0.0 <= result.epsilon <= claim


@pytest.mark.nightly
def test_black_box_sees_what_was_learnt_by_heart() -> None:
    result, _ = black_box(noise_multiplier=0.0, steps=150, lr=0.03)
    print(f"\nblack box, no noise: {result}")
    assert result.epsilon > 0.3
