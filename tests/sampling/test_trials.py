"""Test by exact computation that each trial succeeds with probability q, independently of all others."""

import itertools
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from clipgrad.sampling import _words
from clipgrad.sampling._trials import Trials, random_subset
from clipgrad.sampling._words import seeded_words, system_words, words_from
from tests.nightly import every
from tests.sampling.checks import (
    RATES,
    allowed,
    conditional,
    first_is,
    first_is_below,
    outcomes,
    p_value,
    poisson,
    scripted,
    seeded,
    subsets,
)


def numbers_in_a_window(trials: Trials) -> list[int]:
    """Return all numbers, or both ends, both neighbours of each power of two, and some others."""
    digits = len(trials.ones)
    if digits <= 8:
        return list(range(2**digits))
    chosen = random.Random(0)
    apart = 1 if digits < 100 else 300  # of a thousand digits each number takes a while
    near = [2**k + d for k in range(0, digits, apart) for d in (-1, 0)]
    return [*near, 2**digits - 1, *(chosen.randrange(2**digits) for _ in range(60 // apart))]


def check_conditional(trials: Trials, q: float) -> None:
    for g in numbers_in_a_window(trials):
        assert abs(conditional(trials, g) / Fraction(q) - 1) <= allowed(trials)


@pytest.mark.parametrize("q", RATES)
def test_a_trial_succeeds_with_probability_q_whatever_happened_before(q: float) -> None:
    trials = Trials.of_rate(q)
    check_conditional(trials, q)
    if q >= 0.5:
        assert allowed(trials) == Fraction(1, 2**62)
        assert Fraction(trials.empty, 2**64) == 1 - Fraction(q)  # not at all wrong
    if q >= 1e-9:
        assert allowed(trials) <= Fraction(1, 2**57)
    assert allowed(trials) <= Fraction(1, 2**51)


@pytest.mark.parametrize("q", [1e-9, 0.0042, 0.1])
def test_thresholds_that_are_off_by_2_to_the_minus_53_are_found(q: float) -> None:
    trials = Trials.of_rate(q)
    for k in range(len(trials.ones)):
        ones = (*trials.ones[:k], trials.ones[k] + 2**11, *trials.ones[k + 1 :])
        with pytest.raises(AssertionError):
            check_conditional(replace(trials, ones=ones), q)
    with pytest.raises(AssertionError):
        check_conditional(replace(trials, empty=trials.empty + 2**11), q)


@pytest.mark.parametrize("q", [0.1, 0.3, 0.7, 1.0])
def test_every_batch_has_the_probability_of_a_poisson_sample(q: float) -> None:
    size, trials = 6, Trials.of_rate(q)
    found = outcomes(trials, size)
    assert sum(found.values()) == 1
    for chosen in subsets(size):
        wanted = poisson(chosen, size, q)
        # An index that stays out does so with probability 1 - q, whose error is that of q.
        error = size * allowed(trials) * max(1, Fraction(q) / (1 - Fraction(q)) if q < 1 else 1)
        assert abs(found.get(chosen, 0) - wanted) <= wanted * error


def test_the_recursions_agree() -> None:
    trials = Trials.of_rate(0.1)
    for g in range(8):
        assert first_is_below(trials, g) == sum(first_is(trials, h) for h in range(g))


# ------------------------------------------------- from words to successes, at every boundary


@pytest.mark.parametrize("q", [0.02, 0.1, 0.3, 0.6])
def test_words_at_the_boundaries(q: float) -> None:
    """Check the last word that gives 1 and the first word that gives 0, for each digit of each number."""
    trials = Trials.of_rate(q)
    digits = len(trials.ones)
    for g in range(2**digits):
        size = g + 1
        windows = trials._windows(size)
        # The second window: an empty one comes before it.
        begin = 2**digits
        said = [[one - 1 if g >> k & 1 else one] for k, one in enumerate(trials.ones)]
        first = [trials.empty] + [trials.empty - 1] * (windows - 1)
        assert trials.successes(size, scripted(first, *said)).tolist() == [g]
        size = begin + g + 1
        windows = trials._windows(size)
        second = [trials.empty - 1, trials.empty] + [trials.empty - 1] * (windows - 2)
        assert trials.successes(size, scripted(second, *said)).tolist() == [begin + g]


def test_the_next_window_begins_after_a_success() -> None:
    trials = Trials.of_rate(0.1)
    assert len(trials.ones) == 3
    low, middle, high = trials.ones
    windows = trials._windows(20)
    hits = [trials.empty] * 2 + [trials.empty - 1] * (windows - 2)
    # The first success is number 5, the second number 2 of what follows: 5 + 1 + 2.
    words = scripted(hits, [low - 1, low], [middle, middle - 1], [high - 1, high])
    assert trials.successes(20, words).tolist() == [5, 8]


def test_a_draw_that_falls_short_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one window at a time nearly every draw falls short, which otherwise needs five standard deviations."""
    monkeypatch.setattr(Trials, "_windows", lambda self, trials: 1)
    trials, words = Trials.of_rate(0.3), words_from(seeded(3))
    drawn = [trials.successes(5, words) for _ in range(10_000)]
    assert p_value(drawn, {s: float(poisson(s, 5, 0.3)) for s in subsets(5)}) > 1e-3


@pytest.mark.parametrize("q", every(3, [0.35, 0.1, 0.7]))
def test_seeded_batches_have_the_right_frequencies(q: float) -> None:
    words = words_from(seeded(1))
    trials = Trials.of_rate(q)
    drawn = [trials.successes(3, words) for _ in range(15_000)]
    assert p_value(drawn, {s: float(poisson(s, 3, q)) for s in subsets(3)}) > 1e-3
    for wrong in (q - 0.03, q + 0.03):
        assert p_value(drawn, {s: float(poisson(s, 3, wrong)) for s in subsets(3)}) < 1e-6


@pytest.mark.parametrize("q", [5e-324, 1e-300, 2.0**-70, 1e-9, 0.5, 1.0])
@pytest.mark.parametrize("size", [0, 1, 1000, 2**56])
def test_extremes(q: float, size: int) -> None:
    if q * size > 2**20:
        return
    found = Trials.of_rate(q).successes(size, words_from(seeded()))
    assert found.dtype == np.int64
    assert sorted(set(found.tolist())) == found.tolist()
    assert all(0 <= index < size for index in found.tolist())
    if q == 1.0:
        assert found.tolist() == list(range(size))


# --------------------------------------------------------------------------------------- subsets


def test_subsets_are_uniform() -> None:
    """Keys occur in every order equally often, so all subsets are equally frequent."""
    found = [
        tuple(random_subset(5, 2, scripted(list(keys))).tolist())
        for keys in itertools.permutations(range(5))
    ]
    assert {found.count(pair) for pair in itertools.combinations(range(5), 2)} == {12}
    assert len(found) == 120


def test_equal_keys_are_drawn_again() -> None:
    words = scripted([1, 1, 7], [3, 2**64 - 1, 2**64 - 1], [2, 1, 0])
    assert random_subset(3, 1, words).tolist() == [2]


# ----------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("words", [system_words, words_from(seeded(5))], ids=["system", "seeded"])
def test_words_use_all_their_bits_independently(words: _words.Words) -> None:
    drawn = words(20_000)
    assert (drawn.dtype, drawn.shape, words(0).shape) == (np.uint64, (20_000,), (0,))
    bits = (drawn[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    z = 2.0 * bits - 1
    assert np.abs(z.mean(0)).max() < 8 / 20_000**0.5
    among = z.T @ z / len(z) - np.eye(64)
    assert np.abs(among).max() < 8 / 20_000**0.5


def test_system_words_are_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = iter(np.arange(1000, dtype=np.uint64).tobytes())
    monkeypatch.setattr(_words.secrets, "token_bytes", lambda n: bytes(itertools.islice(stream, n)))
    assert [system_words(3).tolist(), system_words(2).tolist()] == [[0, 1, 2], [3, 4]]


def test_seeded_words_are_the_generators() -> None:
    first, again = seeded(2), seeded(2)
    assert np.array_equal(seeded_words(first, 5), seeded_words(again, 5))
    assert torch.equal(first.get_state(), again.get_state())
    assert not np.array_equal(seeded_words(first, 5), seeded_words(seeded(2), 5))
