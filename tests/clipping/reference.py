"""Every strategy by its formula, one sample at a time in float64, and the adaptive norm by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipgrad import Automatic, PerLayer
from clipgrad.engine.reference import Params

Groups = dict[str, tuple[list[str], float, float | None]]
"""Names, norm, and gamma or None for clipping."""


def groups_of(strategy: Any, params: Params) -> Groups:
    """What a strategy means, spelled out without the library's help."""
    if isinstance(strategy, dict):
        found: Groups = {}
        for name in params:
            prefix = max(
                (p for p in strategy if p in ("", name) or name.startswith(p + ".")), key=len
            )
            norm, gamma = _norm_and_gamma(strategy[prefix])
            found.setdefault(prefix, ([], norm, gamma))[0].append(name)
        return found
    if isinstance(strategy, PerLayer):
        norm, gamma = _norm_and_gamma(strategy.max_grad_norm)
        layers: dict[str, list[str]] = {}
        for name in params:
            layers.setdefault(".".join(name.split(".")[:-1]), []).append(name)
        everything = sum(p.numel() for p in params.values())
        return {
            layer: (
                names,
                norm
                * (
                    math.sqrt(1 / len(layers))
                    if strategy.weights == "uniform"
                    else math.sqrt(sum(params[n].numel() for n in names) / everything)
                ),
                gamma,
            )
            for layer, names in layers.items()
        }
    norm, gamma = _norm_and_gamma(strategy)
    return {"": (list(params), norm, gamma)}


def _norm_and_gamma(rule: Any) -> tuple[float, float | None]:
    return (rule.max_grad_norm, rule.gamma) if isinstance(rule, Automatic) else (rule, None)


def scaled_sum(per_sample: Params, groups: Groups) -> tuple[Params, dict[str, Tensor]]:
    """The sum of scaled gradients and the norms by group; a sample that is not finite contributes nothing."""
    size = len(next(iter(per_sample.values())))
    total = {name: torch.zeros_like(g[0]) for name, g in per_sample.items()}
    norms: dict[str, list[float]] = {group: [] for group in groups}
    for i in range(size):
        own = {
            group: math.sqrt(sum(float(per_sample[n][i].square().sum()) for n in names))
            for group, (names, _, _) in groups.items()
        }
        for group, norm in own.items():
            norms[group].append(norm)
        if not all(map(math.isfinite, own.values())):
            continue
        for group, (names, bound, gamma) in groups.items():
            norm = own[group]
            if gamma is not None:
                factor = bound / (norm + gamma)
            else:
                factor = 1.0 if norm <= bound else bound / norm
            for name in names:
                total[name] += factor * per_sample[name][i]
    return total, {group: torch.tensor(n, dtype=torch.float64) for group, n in norms.items()}


class AdaptiveByHand:
    """Algorithm 1 of Andrew et al. with SGD of rate one on the parameters of a model, written out.

    Args:
        generator: Draws the noise of gradients first, parameter by parameter, then that of the count.
    """

    def __init__(
        self,
        params: Params,
        gradients: Callable[[Params, Tensor], Params],
        generator: torch.Generator,
        *,
        norm: float,
        quantile: float,
        rate: float,
        stddev: float,
        multiplier: float,
        expected: float,
    ) -> None:
        self.params, self.norm = params, norm
        self._gradients, self._generator = gradients, generator
        self._quantile, self._rate, self._stddev = quantile, rate, stddev
        self._multiplier, self._expected = multiplier, expected

    def step(self, batch: Tensor) -> None:
        per_sample = self._gradients(self.params, batch)
        total, norms = scaled_sum(per_sample, {"": (list(self.params), self.norm, None)})
        z = (self._multiplier**-2 - (2 * self._stddev) ** -2) ** -0.5
        for name, parameter in self.params.items():
            noisy = total[name] + self._normal(parameter.shape, z * self.norm)
            self.params[name] = parameter - noisy / self._expected
        count = float((norms[""] <= self.norm).sum()) - len(batch) / 2
        count += float(self._normal((), self._stddev))
        self.norm *= math.exp(-self._rate * (0.5 + count / self._expected - self._quantile))

    def _normal(self, shape: Any, sigma: float) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(0, sigma, generator=self._generator)
