"""Samplers describe themselves to the accountant."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from clipgrad import accounting
from clipgrad.sampling import PoissonSampler, UserSampler


def check(poisson: Callable[..., Any], truncated: Callable[..., Any]) -> None:
    wanted = poisson(sample_rate=0.25)
    assert PoissonSampler(100, expected_batch_size=25).sampling == wanted
    assert PoissonSampler(100, sample_rate=0.25, rank=1, num_replicas=4).sampling == wanted
    ids = ["a", "b", "a", "c", "d"]
    assert UserSampler(ids, expected_users=1).sampling == wanted
    sampler = PoissonSampler(100, sample_rate=0.25, max_batch_size=30)
    wanted = truncated(sample_rate=0.25, num_samples=100, max_batch_size=30)
    assert sampler.sampling == wanted
    wanted = truncated(sample_rate=0.25, num_samples=4, max_batch_size=2)
    assert UserSampler(ids, expected_users=1, max_users=2).sampling == wanted


def test_descriptions() -> None:
    check(accounting.Poisson, accounting.TruncatedPoisson)


def test_what_descriptions_are_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisson(**arguments: Any) -> Any:
        return SimpleNamespace(kind="Poisson", **arguments)

    def truncated(**arguments: Any) -> Any:
        return SimpleNamespace(kind="TruncatedPoisson", **arguments)

    monkeypatch.setattr(accounting, "Poisson", poisson, raising=False)
    monkeypatch.setattr(accounting, "TruncatedPoisson", truncated, raising=False)
    check(poisson, truncated)
