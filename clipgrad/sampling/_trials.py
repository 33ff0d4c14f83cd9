"""Simulate independent trials with the same probability, in time proportional to the number of successes.

Random numbers are compared as integers, so no logarithm of a random number is rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Self

import numpy as np
from numpy.typing import NDArray

from clipgrad.sampling._words import Words

_DIGITS = 60  # a word has 20, and 1 - q for q >= 1/2 at most 53
_MOST_TRIALS = 2**20  # the most windows at once, which bounds the memory
LARGEST = 2**56  # the most trials, so that a sum of 64-bit advances cannot overflow


@dataclass(frozen=True)
class Trials:
    """This class finds the successes among a range of independent trials, each with probability q.

    It proceeds in windows of ``2**m`` trials, where m is the least number with ``(1-q)**2**m <= 1/2``. With that
    probability a window has no success, and the next window begins at its end. Otherwise the first success in it is
    trial ``g < 2**m`` with probability proportional to ``(1-q)**g``. This is a product over the binary digits of g, so
    the digits are *independent*: digit k is 1 with odds ``(1-q)**2**k`` to 1. The next window begins after the success.

    Each of these m + 1 probabilities is rounded to the nearest multiple of ``2**-64``, and comparing a word with an
    integer realises it exactly. Except for the first, which is a multiple anyway if m = 0, the probabilities and their
    complements are at least 1/4, so each has a relative error of at most ``2**-63``. The probability that a trial
    succeeds, given all earlier trials, is a quotient of sums of products of at most m + 1 of them. Hence, **given any
    earlier trials, a trial succeeds with probability ``q * (1 + e)``, ``|e| <= (m + 1) * 2**-62``**. The error e is 0
    for ``q >= 1/2``, at most ``2**-57`` for ``q >= 1e-9``, and at most ``2**-51`` for the smallest float.
    """

    rate: float  # The probability q, ``0 < q <= 1``
    empty: int  # The number of words, out of ``2**64``, for which a window has no success
    # For each binary digit, lowest first, the number of words, out of ``2**64``, for which the digit is 1
    ones: tuple[int, ...]

    @classmethod
    def of_rate(cls, rate: float) -> Self:
        """Return trials with probability ``rate``."""
        exact = Decimal(rate)
        with localcontext() as context:
            context.prec = _DIGITS - min(0, exact.adjusted())  # otherwise 1 - q would round q away
            power = 1 - exact
            log = power.ln()
            context.prec = _DIGITS
            ones: list[int] = []
            while power > Decimal("0.5"):
                ones.append(round(power / (1 + power) * 2**64))
                power = (log * 2 ** len(ones)).exp()
            return cls(rate, round(power * 2**64), tuple(ones))

    def successes(self, size: int, words: Words) -> NDArray[np.int64]:
        """Simulate ``size <= LARGEST`` trials, and return the indices of the successful ones in ascending order."""
        window = min(2 ** len(self.ones), size)  # a window need not reach beyond the last trial
        found = [np.empty(0, dtype=np.int64)]
        last = -1
        while last < size - 1:
            hit = words(self._windows(size - 1 - last)) >= np.uint64(self.empty)
            advance = np.full(len(hit), window, dtype=np.int64)
            advance[hit] = 1 + self._first_successes(int(hit.sum()), size, words)
            position = last + np.cumsum(advance)
            found.append(position[hit])
            last = int(position[-1])
        numbers = np.concatenate(found)
        return numbers[numbers < size]

    def _windows(self, trials: int) -> int:
        """Return a number of windows to simulate at once that nearly always covers ``trials`` trials."""
        mean = trials * self.rate / (1 - self.empty / 2**64)
        return min(int(mean + 5 * math.sqrt(mean)) + 5, _MOST_TRIALS)

    def _first_successes(self, count: int, size: int, words: Words) -> NDArray[np.int64]:
        """Return the first success in each of ``count`` windows that have one, capped at ``size``."""
        first = np.zeros(count, dtype=np.int64)
        for digit, ones in enumerate(self.ones):
            first += (words(count) < np.uint64(ones)) * np.int64(min(2**digit, size))
            np.minimum(first, size, out=first)
        return first


def random_subset(count: int, size: int, words: Words) -> NDArray[np.int64]:
    """Return a uniformly random subset of ``range(count)`` with ``size`` elements, in ascending order.

    It takes the elements with the smallest random keys. The choice is exactly uniform, because all keys are generated
    again if two are equal.
    """
    keys = words(count)
    while len(np.unique(keys)) < count:
        keys = words(count)
    return np.sort(np.argsort(keys)[:size])
