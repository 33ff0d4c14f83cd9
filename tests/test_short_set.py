"""What always runs still stands for what runs with ``--nightly`` only."""

from __future__ import annotations

import itertools
import re

import pytest

from clipgrad.errors import NotPerSampleError
from tests.architectures import ARCHITECTURES, COMPILED, REPRESENTATIVES, Architecture
from tests.nightly import chosen, every, pairs, picked
from tests.test_architectures import EXACT, optimizer_for

BATCH_SIZE = 5
REFUSED = frozenset({"refused"})


def rules_of(architecture: Architecture) -> frozenset[str]:
    """The rules that serve a model's parameters, whether some have none, and whether expressions are shared."""
    model, batch = architecture.build(BATCH_SIZE)
    try:
        rows = optimizer_for(model, architecture).explain(*batch).rows
    except NotPerSampleError:
        assert architecture.may_refuse, architecture.name
        return REFUSED
    served = {re.sub(r" x\d+$", "", part) for row in rows for part in row.by.split(", ")}
    found = {"fallback" if rule.startswith("fallback") else rule for rule in served - {"-"}}
    return frozenset(found | {"expression" for row in rows if "(" in row.parameter})


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_every_set_of_rules_has_a_representative() -> None:
    sets = {architecture.name: rules_of(architecture) for architecture in EXACT}
    covered = {sets[name] for name in REPRESENTATIVES if name in sets} | {REFUSED}
    missing = {rules: name for name, rules in sets.items() if rules not in covered}
    assert not missing, f"add to tests/architectures/_short.py: {sorted(missing.values())}"
    traced = frozenset().union(*(sets[name] for name in COMPILED))
    # What may be refused is compiled by no test; all others are, here or nightly.
    served = frozenset().union(*(sets[a.name] for a in EXACT if not a.may_refuse))
    untraced = served - traced
    assert not untraced, f"COMPILED in tests/architectures/_short.py lacks a use of {untraced}"


def test_representatives_exist() -> None:
    assert ARCHITECTURES.keys() >= REPRESENTATIVES
    assert 50 <= len(REPRESENTATIVES) <= 70
    assert COMPILED < REPRESENTATIVES


def test_pairs_hold_each_two_values_together() -> None:
    axes = ("ab", "cde", "fg", "hi")
    made = pairs(*axes)
    assert [p.values for p in made] == list(itertools.product(*axes))
    short = [p.values for p in made if not p.marks]
    assert len(short) < len(made) / 2
    for one, other in itertools.combinations(range(4), 2):
        seen = {(row[one], row[other]) for row in short}
        assert seen == set(itertools.product(axes[one], axes[other]))


def test_nothing_is_left_out_for_good() -> None:
    assert [p.values for p in every(3, "abcde")] == [(c,) for c in "abcde"]
    assert [p.id for p in every(3, "abcde") if not p.marks] == ["a", "d"]
    assert [p.id for p in picked([("a", 1), ("b", 2)], {"b-2"}) if not p.marks] == ["b-2"]
    for left_out in (lambda: chosen("abc", {"f"}), lambda: picked([("a", 1)], {"f-1"})):
        with pytest.raises(ValueError, match="f"):
            left_out()
