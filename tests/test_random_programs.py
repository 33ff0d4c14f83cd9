"""Random losses against the per-sample loop: equal, or refused on purpose.

``python -m tests.random_programs --seed 0 --count 2000`` counts, and reduces what fails.
"""

from __future__ import annotations

import pytest
import torch

from tests.random_programs import EXACT, FOREIGN, REFUSED, VAGUE, WRONG, check, make_program
from tests.random_programs._reduce import reduce

SHORT, NIGHTLY, TOGETHER = 100, 2000, 50


def assert_exact_or_refused(seed: int) -> None:
    program = make_program(seed)
    outcome = check(program)
    assert outcome.kind in (EXACT, REFUSED, VAGUE), (
        f"{outcome.kind}\n{program.describe()}\n{outcome.detail}"
    )


@pytest.mark.parametrize("seed", range(SHORT))
def test_program(seed: int) -> None:
    assert_exact_or_refused(seed)


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(SHORT, SHORT + NIGHTLY, TOGETHER))
def test_many_programs(start: int) -> None:
    for seed in range(start, start + TOGETHER):
        assert_exact_or_refused(seed)


def test_few_programs_are_refused() -> None:
    kinds = [check(make_program(seed), runs=1).kind for seed in range(SHORT)]
    assert kinds.count(EXACT) >= 0.85 * SHORT
    assert VAGUE not in kinds


def test_a_seed_makes_the_same_program_again() -> None:
    first, second = make_program(5), make_program(5)
    assert first.text == second.text
    assert all(map(torch.equal, first.batch, second.batch))
    for name, parameter in first.params.items():
        assert torch.equal(parameter, second.params[name])


def test_a_wrong_result_is_seen_and_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    program = next(p for p in map(make_program, range(100)) if ".tanh()" in p.text)
    assert check(program).kind == EXACT
    from tests.random_programs import _check

    truth = _check.definition

    def shifted(*args: object) -> object:
        losses, gradients = truth(*args)
        return losses, {name: g * (1 + 1e-7) for name, g in gradients.items()}

    monkeypatch.setattr(_check, "definition", shifted)
    assert check(program).kind == WRONG
    assert len(reduce(program, WRONG).lines) <= 3


def test_an_error_of_others_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.random_programs import _check

    def broken(*args: object, **options: object) -> object:
        raise IndexError

    monkeypatch.setattr(_check, "clipped_grad", broken)
    assert check(make_program(0)).kind == FOREIGN
