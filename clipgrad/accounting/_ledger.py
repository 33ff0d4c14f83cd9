"""What a run has released so far, and what that reveals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from . import _checks
from ._backends import Backend, backend, delta_of, epsilon_of
from ._checks import Accountant
from ._entries import Entry, entry_from, entry_state, goes_on_from
from ._sampling import FixedSize, Sampling, require_sampling, require_supported
from ._terms import terms_of


class Ledger:
    """Adds up noisy steps; noise and sampling may change on the way.

    :meth:`record` every step, also those with an empty batch; it costs some microseconds. Then
    ask. The bounds hold for a schedule that was fixed beforehand: how much noise a step gets and
    when training stops must not be decided from what was released.

    With ``accountant="rdp"`` an answer takes a tenth of a millisecond. With ``"pld"`` it takes a second for
    each noise level that is new, and a fraction of one after that: ask once an epoch.

    More steps never give a smaller answer. Should rounding let a bound fall in its last digits, the
    earlier one is repeated: what was released since has not made the run more private.

    Args:
        relation: Which datasets are neighbours: ``"add_or_remove_one"``, ``"replace_one"``,
            ``"replace_special"``, or a :class:`clipgrad.Relation`.
        accountant: ``"pld"`` (tight), ``"rdp"`` (quick) or ``"rdp_integer"`` (for the exact mode).

    Raises:
        ValueError: If a name is unknown.

    Examples:
        >>> from clipgrad.accounting import Poisson
        >>> ledger = Ledger(accountant="rdp")
        >>> for sigma in (1.0, 1.0, 2.0):
        ...     ledger.record(sigma, Poisson(0.01))
        >>> ledger.steps, [(entry.noise_multiplier, entry.steps) for entry in ledger.history]
        (3, [(1.0, 2), (2.0, 1)])
        >>> 0 < ledger.epsilon(1e-5) < ledger.epsilon(1e-6)
        True
    """

    def __init__(
        self, *, relation: str | Enum = "add_or_remove_one", accountant: Accountant = "pld"
    ) -> None:
        self._accountant = _checks.accountant_name(accountant)
        self._relation = _checks.relation_name(relation)
        self._history: list[Entry] = []
        self._steps = 0
        self._stretch = 0
        self._forget()

    @property
    def relation(self) -> str:
        """The name of the relation."""
        return self._relation

    @property
    def accountant(self) -> str:
        """Its name."""
        return self._accountant

    @property
    def steps(self) -> int:
        """Steps recorded so far."""
        return self._steps

    @property
    def history(self) -> tuple[Entry, ...]:
        """The steps in their order, equal neighbours counted together."""
        return tuple(self._history)

    def record(
        self,
        noise_multiplier: float,
        sampling: Sampling,
        steps: int = 1,
        *,
        run: str = "",
        declared: str = "",
    ) -> None:
        """Note that steps were released.

        Args:
            noise_multiplier: Standard deviation of the noise per unit of sensitivity, where the
                sensitivity is that of the ledger's relation; 0 makes epsilon infinite.
            sampling: How the batches were drawn.
            steps: How many, at least 1.
            run: Names the run of a plan that they belong to.
            declared: How the batches were drawn, in the user's own words, if nothing checked it.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a number is out of range, or the accountant or the relation cannot treat
                ``sampling``; nothing is recorded then.
        """
        last = self._history[-1] if self._history else None
        if not (last and sampling is last.sampling):
            require_sampling(sampling)
            require_supported(sampling, relation=self._relation, accountant=self._accountant)
        noise = _checks.at_least_0("noise_multiplier", noise_multiplier)
        count = _checks.integer("steps", steps, least=1)
        stretch = self._stretch if isinstance(sampling, FixedSize) else 0
        both = last and isinstance(sampling, FixedSize) and isinstance(last.sampling, FixedSize)
        if last and both and last.run != run:  # passes of two runs do not continue one another
            stretch = self._stretch = max(entry.stretch for entry in self._history) + 1
        entry = Entry(noise, sampling, count, stretch, run, declared)
        if last and replace(entry, steps=last.steps) == last:
            self._history[-1] = replace(last, steps=last.steps + count)
        else:
            self._history.append(entry)
        self._steps += count

    def steps_of(self, run: str) -> int:
        """Steps that belong to one run of a plan."""
        return sum(entry.steps for entry in self._history if entry.run == run)

    def begin(self) -> None:
        """Say that the next step begins a training, or goes on with one after a restart.

        With :class:`FixedSize` batches its pass is another one than the last step's, which costs up to one pass more
        if that was not finished: the order of the batches is another. With other batches it changes nothing.
        """
        if self._history and isinstance(self._history[-1].sampling, FixedSize):
            self._stretch = self._history[-1].stretch + 1

    def epsilon(self, delta: float, *, group_size: int = 1) -> float:
        """The epsilon for which all that was recorded is ``(epsilon, delta)`` differentially private.

        Args:
            delta: Probability with which epsilon may fail to hold, ``0 < delta < 1``.
            group_size: The most samples that one person has; neighbours then differ in all of
                them. Under Poisson sampling only with ``"pld"``, and not for ``"replace_one"``.

        Returns:
            At least 0; infinite without noise, 0.0 without steps.

        Raises:
            ValueError: If a number is out of range, or the group cannot be accounted for.
            ImportError: If ``dp-accounting`` is not installed.
        """
        target = _checks.probability("delta", delta)
        return self._answer("epsilon", target, group_size)

    def delta(self, epsilon: float, *, group_size: int = 1) -> float:
        """The delta for which all that was recorded is ``(epsilon, delta)`` differentially private.

        Args:
            epsilon: At least 0.
            group_size: As in :meth:`epsilon`.

        Returns:
            Between 0 and 1; 1.0 without noise, 0.0 without steps.

        Raises:
            ValueError: If a number is out of range, or the group cannot be accounted for.
            ImportError: If ``dp-accounting`` is not installed.
        """
        return self._answer("delta", _checks.at_least_0("epsilon", epsilon), group_size)

    def _answer(self, asked: str, at: float, group_size: int) -> float:
        size = _checks.integer("group_size", group_size, least=1)
        steps, before = self._answers.get((asked, at, size), (0, 0.0))
        if steps == self._steps:
            return before
        if size > 1:
            for sampling in {entry.sampling for entry in self._history}:
                require_supported(
                    sampling,
                    relation=self._relation,
                    accountant=self._accountant,
                    group_size=size,
                )
        runs = [
            (entry.noise_multiplier, entry.sampling, entry.steps, entry.stretch)
            for entry in self._history
        ]
        terms = terms_of(runs, relation=self._relation, group_size=size)
        within = self._backends.setdefault(size, backend(self._accountant))
        answer = (epsilon_of if asked == "epsilon" else delta_of)(terms, at, within)
        # A bound may be raised; what was released since has not made the run more private.
        answer = max(answer, before)
        self._answers[asked, at, size] = (self._steps, answer)
        return answer

    def _forget(self) -> None:
        """Answers belong to one history, and the distributions behind them are large."""
        self._answers: dict[tuple[str, float, int], tuple[int, float]] = {}
        self._backends: dict[int, Backend] = {}

    def state_dict(self) -> dict[str, Any]:
        """The history in strings, lists and numbers; loads with ``weights_only=True``."""
        return {
            "kind": "Ledger",
            "format": 2,
            "relation": self._relation,
            "accountant": self._accountant,
            "history": list(map(entry_state, self._history)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved history that goes on from this one.

        What was released stays released: the saved history must begin with all that is recorded here.

        Args:
            state: What :meth:`state_dict` returned, of a ledger with the same relation and accountant.

        Raises:
            ValueError: If it did not, or forgets steps; this ledger is as before then.
            TypeError: If a number in it is none.
        """
        loaded = self.read(state)
        self._history, self._steps = loaded._history, loaded._steps
        self._stretch = loaded._stretch
        self._forget()

    def read(self, state: Mapping[str, Any]) -> Ledger:
        """The ledger that :meth:`load_state_dict` would make of this one; changes nothing.

        Args:
            state: As for :meth:`load_state_dict`.

        Raises:
            ValueError: Likewise.
            TypeError: Likewise.
        """
        expected = {**self.state_dict(), "history": None}
        given = {**state, "history": None}
        if given != expected or not isinstance(state.get("history"), list):
            raise ValueError(
                "state must be the state_dict() of a Ledger with "
                f"relation={self._relation!r} and accountant={self._accountant!r}, got {given!r}."
            )
        loaded = Ledger(relation=self._relation, accountant=self._accountant)  # type: ignore[arg-type]
        for entry in map(entry_from, state["history"]):
            loaded._stretch = entry.stretch
            loaded.record(
                entry.noise_multiplier,
                entry.sampling,
                entry.steps,
                run=entry.run,
                declared=entry.declared,
            )
        if not goes_on_from(self._history, loaded._history):
            raise ValueError(
                f"state holds {loaded._steps} released steps and forgets some of the {self._steps} of this ledger: "
                "what was released in this process stays released. To return to earlier weights load the model's "
                "state alone; to resume after a restart load into a new ledger, or a new DPOptimizer of a new plan."
            )
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: without what can be computed again."""
        return {**self.__dict__, "_answers": {}, "_backends": {}, "_history": list(self._history)}

    def __repr__(self) -> str:
        return (
            f"Ledger(relation={self._relation!r}, accountant={self._accountant!r}): "
            f"{self._steps} steps"
        )
