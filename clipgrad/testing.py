"""Test your own rules: describe a use of an operation, and compare the rule with the definition."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.engine import reference
from clipgrad.function import clipped_grad
from clipgrad.options import Performance
from clipgrad.result import ClippedGradResult
from clipgrad.rules import registry

Params = dict[str, Tensor]
STRATEGIES = ("kept", "ghost")
_MOST_PROBLEMS = 20
_REPEATABLE = 1e-12


@dataclass(frozen=True)
class RuleCase:
    """A case is one way to call an operation that has a rule.

    Attributes:
        rule: The rule's name in the registry.
        name: A description of the case.
        loss: ``loss(params, *batch) -> scalar``; it sees a batch of one.
        params: Returns the parameters, float64, by name. It is called after seeding.
        batch: Returns the batch arguments for a batch size. It is called after seeding.
        declines: Whether the rule must leave this call to the fallback.
    """

    rule: str
    name: str
    loss: Callable[..., Tensor]
    params: Callable[[], Params]
    batch: Callable[[int], tuple[Any, ...]]
    declines: bool = False


def assert_rule_matches_reference(
    case: RuleCase,
    *,
    batch_sizes: Sequence[int] = (1, 5),
    strategies: Sequence[str] = STRATEGIES,
    microbatch_sizes: Sequence[int | None] = (1, 3, None),
    tolerance: float = 1e-9,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Compare losses, norms and clipped sums of a rule with the definition, one sample at a time in float64.

    The clipping norm is the median of the norms, so that some samples are clipped and some are not. The function also
    checks that

    * the rule runs and does not decline the call (or declines, if the case says so);
    * every parameter of the case has a gradient;
    * the result is the same without the rule, if ``vmap`` supports the operation;
    * a padded sample contributes exactly nothing, whatever its values;
    * a sample of NaN does not change the sum of the other samples.

    Args:
        case: The call of the operation.
        batch_sizes: Numbers of samples to try.
        strategies: Norm strategies to try.
        microbatch_sizes: Microbatch sizes to try; include a size that does not divide the batch.
        tolerance: Largest error, relative to the largest expected value (and absolute below one).
        seed: The seed for ``case.params`` and ``case.batch``.
        device: The device to compare on; tensors of the case are moved to it.

    Raises:
        AssertionError: If results differ; the message names rule, case, strategy, microbatch, value and difference.
    """
    problems: list[str] = []
    for size in batch_sizes:
        trial = _Trial.make(case, size, seed, tolerance, device)
        problems += trial.unusable()
        for strategy in strategies:
            for microbatch in microbatch_sizes:
                if microbatch is None or microbatch < size:  # otherwise it is the whole batch again
                    problems += trial.compare(strategy, microbatch)
            if size > 1:
                problems += trial.compare_padded(strategy) + trial.compare_poisoned(strategy)
        problems += trial.compare_without_rule()
    if problems:
        lines = [f"rule {case.rule!r}, case {case.name!r}, against the definition:"]
        lines += problems[:_MOST_PROBLEMS]
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"and {len(problems) - _MOST_PROBLEMS} more")
        raise AssertionError("\n  ".join(lines))


@dataclass(frozen=True)
class _Trial:
    """A trial holds random parameters and a random batch of one case, with the results of the definition."""

    case: RuleCase
    params: Params
    batch: tuple[Any, ...]
    size: int
    tolerance: float
    losses: Tensor
    gradients: Params
    max_grad_norm: float

    @classmethod
    def make(cls, case: RuleCase, size: int, seed: int, tolerance: float, device: str) -> _Trial:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            params, batch = tree_map(
                lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf,
                (case.params(), case.batch(size)),
            )
        losses, gradients = reference.per_sample_gradients_by_loop(case.loss, params, *batch)
        _, norms = reference.clipped_sum(gradients, 1.0)
        return cls(case, params, batch, size, tolerance, losses, gradients, float(norms.median()))

    def unusable(self) -> list[str]:
        """Return the reasons for which the case proves nothing."""
        found = [
            f"the loss does not depend on parameter {name!r}; leave it out or use it"
            for name, gradient in self.gradients.items()
            if not gradient.any()
        ]
        _, norms = reference.clipped_sum(self.gradients, 1.0)
        if self.size > 2 and not (norms > self.max_grad_norm).any():
            found.append(f"all samples have the same norm, {self.max_grad_norm}: vary the batch")
        if any(p.dtype is not torch.float64 for p in self.params.values()):
            found.append("parameters must be float64: at lower precision, rounding hides errors")
        with _record_calls(self.case.rule) as taken:
            self.run("kept", None)
        if not taken and not self.case.declines:
            found.append("the rule did not run: no call reached it, or it declined every call")
        if taken and self.case.declines:
            found.append("the rule ran, but declines=True says that it must not")
        return found

    def run(
        self,
        strategy: str,
        microbatch: int | None,
        *,
        batch: tuple[Any, ...] | None = None,
        is_padding: Tensor | None = None,
    ) -> ClippedGradResult:
        gradient = clipped_grad(
            self.case.loss,
            max_grad_norm=self.max_grad_norm,
            performance=Performance(strategy=strategy),
            microbatch_size=microbatch,
        )
        batch = self.batch if batch is None else batch
        return gradient(self.params, *batch, is_padding=is_padding)

    def compare(self, strategy: str, microbatch: int | None) -> list[str]:
        result = self.run(strategy, microbatch)
        where = f"strategy {strategy}, batch of {self.size}, microbatch {microbatch}"
        sums, norms = reference.clipped_sum(self.gradients, self.max_grad_norm)
        found = self._differences(where, result, sums)
        found += self._difference(f"{where}: losses", result.values, self.losses)
        assert isinstance(result.grad_norms, Tensor)
        return found + self._difference(f"{where}: norms", result.grad_norms, norms)

    def compare_padded(self, strategy: str) -> list[str]:
        """Compare with the first sample as padding, also after replacing its values by those of the last sample."""
        where = f"strategy {strategy}, batch of {self.size}, first sample padded"
        mask = torch.arange(self.size) == 0
        result = self.run(strategy, None, is_padding=mask)
        others = {name: gradient[1:] for name, gradient in self.gradients.items()}
        found = self._differences(
            where, result, reference.clipped_sum(others, self.max_grad_norm)[0]
        )
        changed = tree_map(lambda leaf: torch.cat([leaf[-1:], leaf[1:]]), self.batch)
        again = self.run(strategy, None, batch=changed, is_padding=mask)
        for name, total in result.grads.items():
            # Not bitwise: on CUDA the order of a sum may change from run to run.
            if not torch.allclose(total, again.grads[name], rtol=_REPEATABLE, atol=_REPEATABLE):
                found.append(f"{where}: its content changes grads[{name!r}]")
        return found

    def compare_poisoned(self, strategy: str) -> list[str]:
        """Compare with NaN in all floating-point values of the first sample."""
        where = f"strategy {strategy}, batch of {self.size}, first sample NaN"

        def poison(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            return torch.cat([torch.full_like(leaf[:1], torch.nan), leaf[1:]])

        batch = tree_map(poison, self.batch)
        first = tree_map(lambda leaf: leaf[:1], batch)
        _, poisoned = reference.per_sample_gradients_by_loop(self.case.loss, self.params, *first)
        gradients = {
            name: torch.cat([poisoned[name], gradient[1:]])
            for name, gradient in self.gradients.items()
        }
        sums, norms = reference.clipped_sum(gradients, self.max_grad_norm)
        result = self.run(strategy, None, batch=batch)
        found = self._differences(where, result, sums)
        dropped, expected = int(result.num_nonfinite), int((~norms.isfinite()).sum())
        if dropped != expected:
            found.append(f"{where}: {dropped} samples dropped, {expected} expected")
        return found

    def compare_without_rule(self) -> list[str]:
        """Compare without the rule, and compare the two forms of the definition, the loop and ``vmap(grad)``."""
        sums, _ = reference.clipped_sum(self.gradients, self.max_grad_norm)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # a warning about slow operations is no reason to skip
                gradients = reference.per_sample_gradients(self.case.loss, self.params, *self.batch)
        except (RuntimeError, NotImplementedError):
            return []  # vmap does not support the operation, so there is nothing to fall back to
        found = [
            problem
            for name, gradient in gradients.items()
            for problem in self._difference(
                f"vmap(grad) itself, gradient of {name!r}", gradient, self.gradients[name]
            )
        ]
        if found:
            return found
        with _without_rule(self.case.rule), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = self.run("auto", None)
        return self._differences(f"batch of {self.size}, rule removed", result, sums)

    def _differences(self, where: str, result: ClippedGradResult, sums: Params) -> list[str]:
        return [
            problem
            for name, expected in sums.items()
            for problem in self._difference(
                f"{where}: grads[{name!r}]", result.grads[name], expected
            )
        ]

    def _difference(self, what: str, actual: Tensor, expected: Tensor) -> list[str]:
        if actual.shape != expected.shape:
            return [f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"]
        if expected.numel() == 0:
            return []
        scale = max(1.0, float(expected.abs().max()))
        error = float((actual - expected).abs().max()) / scale
        return [] if error <= self.tolerance else [f"{what} off by {error:.1e}"]


def _entries(name: str) -> dict[Callable[..., Any], registry.Rule | registry.Decomposition]:
    found = {op: entry for op, entry in registry.rules().items() if entry.name == name}
    if not found:
        raise AssertionError(f"no rule named {name!r} is registered")
    return found


@contextmanager
def _without_rule(name: str) -> Iterator[None]:
    """Run the body without one rule."""
    with patch.dict(registry._RULES):
        for operation in _entries(name):
            registry.unregister_rule(operation)
        yield


@contextmanager
def _record_calls(name: str) -> Iterator[list[str]]:
    """Collect the name of a rule each time that it returns without declining."""
    taken: list[str] = []

    def spy(apply: Callable[..., Any]) -> Callable[..., Any]:
        def spied(*args: Any, **kwargs: Any) -> Any:
            result = apply(*args, **kwargs)
            taken.append(name)
            return result

        return spied

    spies = {op: replace(entry, apply=spy(entry.apply)) for op, entry in _entries(name).items()}
    with patch.dict(registry._RULES, spies):
        yield taken


__all__ = ["RuleCase", "assert_rule_matches_reference"]
