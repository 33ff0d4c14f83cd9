"""This module computes the epsilon of a run of equal steps as a function of its noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from . import _checks
from ._backends import backend, epsilon_of
from ._sampling import (
    CyclicPoisson,
    Poisson,
    Sampling,
    TruncatedPoisson,
    require_sampling,
    require_supported,
)
from ._terms import Terms, terms_of


@dataclass(frozen=True)
class EqualSteps:
    """This class describes a run of steps with the same numbers, except for its noise."""

    sampling: Sampling
    steps: int
    delta: float
    accountant: str
    relation: str
    group_size: int
    coarseness: int = 1
    """Factor on the interval of the grid of privacy losses; epsilon stays an upper bound."""

    @classmethod
    def from_arguments(
        cls,
        sample_rate: float | None,
        sampling: Sampling | None,
        steps: object,
        delta: object,
        accountant: object,
        relation: object,
        group_size: object,
    ) -> EqualSteps:
        count = _checks.integer("steps", steps, least=0)
        if (sample_rate is None) == (sampling is None):
            raise ValueError(
                f"sample_rate and sampling are {sample_rate} and {sampling}; give exactly one of "
                "them: sample_rate=q stands for sampling=Poisson(q)."
            )
        drawn = require_sampling(sampling) if sample_rate is None else Poisson(sample_rate)
        probability = _checks.probability("delta", delta)
        by, name = _checks.accountant_name(accountant), _checks.relation_name(relation)
        size = _checks.integer("group_size", group_size, least=1)
        require_supported(drawn, relation=name, accountant=by, group_size=size)
        return cls(drawn, count, probability, by, name, size)

    def epsilon(self, noise: float) -> float:
        """Return epsilon for a noise multiplier, in units of the relation's sensitivity."""
        if self.steps == 0:
            return 0.0
        runs = [(noise, self.sampling, self.steps, 0)]
        terms = terms_of(runs, relation=self.relation, group_size=self.group_size)
        return _epsilon(terms, self.delta, self.accountant, self.coarseness)

    def with_steps(self, steps: int) -> EqualSteps:
        return replace(self, steps=steps)

    def renyi_estimate(self) -> EqualSteps:
        """Return a run with about the same epsilon that Renyi accounting supports."""
        renyi = replace(self, accountant="rdp")
        match self.sampling:
            case Poisson(rate) | TruncatedPoisson(rate):
                near = Poisson(min(1.0, rate * self.group_size))
                return replace(renyi, sampling=near, relation="add_or_remove_one", group_size=1)
            case CyclicPoisson():
                return replace(renyi, relation="add_or_remove_one")
        return renyi


@lru_cache(maxsize=64)
def _epsilon(terms: Terms, delta: float, accountant: str, coarseness: int) -> float:
    return epsilon_of(terms, delta, backend(accountant, coarseness=coarseness))
