"""Independent trials with the same probability, in time proportional to the number of successes.

Numbers are compared as integers: no logarithm of a random number is rounded anywhere.
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
_MOST_TRIALS = 2**20  # at once, which bounds the memory
LARGEST = 2**56  # a sum of 64-bit advances is then far from an overflow


@dataclass(frozen=True)
class Trials:
    """Finds the successes among a range of independent trials, each with probability q.

    It walks in windows of ``2**m`` trials, where m is the least with ``(1-q)**2**m <= 1/2``. A
    window is without success with that probability; the next one then begins at its end. Otherwise
    the first success in it is the number ``g < 2**m`` with probability proportional to
    ``(1-q)**g``: a product over the binary digits of g, which are therefore *independent*, digit k
    being 1 with odds ``(1-q)**2**k`` to 1. The next window begins after the success.

    Each of these m + 1 probabilities is rounded to the nearest multiple of ``2**-64`` and met
    exactly by comparing a word with an integer. Except for the first, which is a multiple anyway
    when m = 0, they and their complements are at least 1/4, so that each has a relative error of at
    most ``2**-63``; a probability that a trial succeeds, given all trials before it, is a quotient
    of sums of products of at most m + 1 of them. Hence, **whatever happened before, a trial
    succeeds with probability ``q * (1 + e)``, ``|e| <= (m + 1) * 2**-62``**: not at all wrong for
    ``q >= 1/2``, to ``2**-57`` for ``q >= 1e-9``, to ``2**-51`` for the smallest float.

    Attributes:
        rate: The probability q, ``0 < q <= 1``.
        empty: Of ``2**64`` words, those that say that a window is without success.
        ones: For each binary digit, the lowest first: of ``2**64`` words, those that say 1.
    """

    rate: float
    empty: int
    ones: tuple[int, ...]

    @classmethod
    def of_rate(cls, rate: float) -> Self:
        """The trials with probability ``rate``."""
        exact = Decimal(rate)
        with localcontext() as context:
            context.prec = _DIGITS - min(0, exact.adjusted())  # else 1 - q would forget q
            power = 1 - exact
            log = power.ln()
            context.prec = _DIGITS
            ones: list[int] = []
            while power > Decimal("0.5"):
                ones.append(round(power / (1 + power) * 2**64))
                power = (log * 2 ** len(ones)).exp()
            return cls(rate, round(power * 2**64), tuple(ones))

    def successes(self, size: int, words: Words) -> NDArray[np.int64]:
        """Draw ``size`` trials.

        Args:
            size: Number of trials, at most ``LARGEST``.
            words: Where randomness comes from.

        Returns:
            The numbers of those that succeeded, counted from 0, in ascending order.
        """
        window = min(2 ** len(self.ones), size)  # to the end is far enough
        found = [np.empty(0, dtype=np.int64)]
        last = -1
        while last < size - 1:
            hit = words(self._windows(size - 1 - last)) >= np.uint64(self.empty)
            advance = np.full(len(hit), window, dtype=np.int64)
            advance[hit] = 1 + self._first(int(hit.sum()), size, words)
            position = last + np.cumsum(advance)
            found.append(position[hit])
            last = int(position[-1])
        numbers = np.concatenate(found)
        return numbers[numbers < size]

    def _windows(self, trials: int) -> int:
        """How many windows to draw at once: nearly always enough for so many trials."""
        mean = trials * self.rate / (1 - self.empty / 2**64)
        return min(int(mean + 5 * math.sqrt(mean)) + 5, _MOST_TRIALS)

    def _first(self, count: int, size: int, words: Words) -> NDArray[np.int64]:
        """First successes of so many windows that have one; ``size`` for all beyond it."""
        first = np.zeros(count, dtype=np.int64)
        for digit, ones in enumerate(self.ones):
            first += (words(count) < np.uint64(ones)) * np.int64(min(2**digit, size))
            np.minimum(first, size, out=first)
        return first


def random_subset(count: int, size: int, words: Words) -> NDArray[np.int64]:
    """A uniformly random subset of ``range(count)`` with ``size`` elements, in ascending order.

    The elements with the smallest of as many random keys: exactly uniform, since keys of which two
    are the same are drawn again.
    """
    keys = words(count)
    while len(np.unique(keys)) < count:
        keys = words(count)
    return np.sort(np.argsort(keys)[:size])
