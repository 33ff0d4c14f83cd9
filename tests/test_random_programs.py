"""Random losses against the per-sample loop: equal, or refused on purpose.

``python -m tests.random_programs --seed 0 --count 2000`` counts, and reduces what fails.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from torch import Tensor

from clipgrad import clipped_grad
from tests.random_programs import EXACT, FOREIGN, REFUSED, VAGUE, WRONG, _check, check, make_program
from tests.random_programs._draft import Draft, Operation, Unfit
from tests.random_programs._layers import LAYERS
from tests.random_programs._others import OTHERS
from tests.random_programs._reduce import reduce
from tests.small_mlp import Params, close, definition, draw

SHORT, NIGHTLY, TOGETHER, TRIALS = 100, 2000, 50, 30


def _named(operation: Operation) -> str:
    return operation.__qualname__.partition(".")[0]


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


@pytest.mark.nightly
def test_few_programs_are_refused() -> None:
    kinds = [check(make_program(seed), runs=1).kind for seed in range(SHORT)]
    assert kinds.count(EXACT) >= 0.85 * SHORT
    assert VAGUE not in kinds


@pytest.mark.nightly
@pytest.mark.parametrize("operation", dict.fromkeys([*LAYERS, *OTHERS]), ids=_named)
def test_every_operation_is_drawn(operation: Operation) -> None:
    """An operation that fails whenever it is drawn would be missing in silence."""
    made = 0
    for seed in range(TRIALS):
        torch.manual_seed(seed)
        draft = Draft(random.Random(seed))
        shape = [(3,), (2, 3), (4, 2, 3)][seed % 3]
        draft.scope = {
            "x": draw(1, *shape),
            "ids": torch.randint(5, (1, 3)),
            "y": torch.tensor([1]),
        }
        draft.vectors, _ = ["x"], draft.plain(2)
        with contextlib.suppress(Unfit, RuntimeError):
            draft.bind(operation(draft, "x"), "h")
            made += 1
    assert made >= TRIALS / 4


def test_solve_with_fewer_axes_on_the_right() -> None:
    """PyTorch's vmap pairs every matrix with every right side."""
    params, batch = {"w": draw(3, 2)}, (draw(4, 3, 3),)

    def loss(p: Params, x: Tensor) -> Tensor:
        return torch.linalg.solve(x + 5 * torch.eye(3, dtype=x.dtype), p["w"]).sin().sum()

    sums, norms = definition(params, *batch, norm=1.0, fn=loss)
    result = clipped_grad(loss, max_grad_norm=1.0)(params, *batch)
    close(result.grad_norms, norms, rtol=1e-9, atol=1e-9)
    close(result.grads, sums, rtol=1e-9, atol=1e-9)


def test_a_seed_makes_the_same_program_again() -> None:
    first, second = make_program(5), make_program(5)
    assert first.text == second.text
    assert all(map(torch.equal, first.batch, second.batch))
    for name, parameter in first.params.items():
        assert torch.equal(parameter, second.params[name])


def test_a_wrong_result_is_seen_and_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    program = next(p for p in map(make_program, range(100)) if ".tanh()" in p.text)
    assert check(program).kind == EXACT
    truth = _check.definition

    def shifted(*args: object) -> object:
        losses, gradients = truth(*args)
        return losses, {name: g + 1e-4 for name, g in gradients.items()}

    monkeypatch.setattr(_check, "definition", shifted)
    assert check(program).kind == WRONG
    assert len(reduce(program, WRONG).lines) <= 3


def test_an_error_of_others_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> object:
        raise IndexError

    monkeypatch.setattr(_check, "clipped_grad", broken)
    assert check(make_program(0)).kind == FOREIGN
