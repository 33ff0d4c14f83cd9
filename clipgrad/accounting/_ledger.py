"""This module records what a run has released and bounds what that reveals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from . import _checks
from ._backends import Backend, backend, delta_of, epsilon_of
from ._checks import Accountant
from ._entries import Entry, entry_from, entry_state, is_continuation
from ._sampling import CyclicPoisson, FixedSize, Sampling, require_sampling, require_supported
from ._terms import terms_of

# Sampling for which steps cost less if they belong to the same pass, or to the same round of all groups.
_IN_SEGMENTS = (FixedSize, CyclicPoisson)


class Ledger:
    """This class adds up noisy steps, whose noise and sampling may change during a run.

    Call :meth:`record` for every step, also for empty batches; a call takes some microseconds. Then query
    :meth:`epsilon` or :meth:`delta`. The bounds hold for a schedule that was fixed beforehand: neither the noise of a
    step nor the end of training may depend on what was released.

    With ``accountant="rdp"`` a query takes a tenth of a millisecond. With ``"pld"`` it takes a second for each new
    noise level, and a fraction of a second after that, so query it once per epoch.

    More steps never give a smaller bound. If rounding lowers a bound in its last digits, the earlier bound is returned:
    more releases do not make a run more private.

    Args:
        relation: Which datasets are neighbours: ``"add_or_remove_one"``, ``"replace_one"``, ``"replace_special"``, or a
            :class:`clipgrad.Relation`.
        accountant: ``"pld"`` (tight), ``"rdp"`` (quick) or ``"rdp_integer"`` (for exact mode).

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
        self._segment = 0
        self._clear_cache()

    @property
    def relation(self) -> str:
        """Return the name of the relation."""
        return self._relation

    @property
    def accountant(self) -> str:
        """Return the name of the accountant."""
        return self._accountant

    @property
    def steps(self) -> int:
        """Return the number of recorded steps."""
        return self._steps

    @property
    def history(self) -> tuple[Entry, ...]:
        """Return the recorded steps in order; consecutive equal steps form a single entry."""
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
        """Record released steps.

        Args:
            noise_multiplier: Standard deviation of the noise per unit of sensitivity under the ledger's relation; 0
                makes epsilon infinite.
            sampling: How the batches were sampled.
            steps: Number of steps, at least 1.
            run: Name of the run of a plan that the steps belong to.
            declared: How the batches were sampled, in the user's own words, if clipgrad did not check it.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a number is out of range, or the accountant or the relation does not support ``sampling``;
                nothing is recorded then.
        """
        last = self._history[-1] if self._history else None
        if not (last and sampling is last.sampling):
            require_sampling(sampling)
            require_supported(sampling, relation=self._relation, accountant=self._accountant)
        noise = _checks.at_least_0("noise_multiplier", noise_multiplier)
        count = _checks.integer("steps", steps, least=1)
        segment = self._segment if isinstance(sampling, _IN_SEGMENTS) else 0
        both = last and isinstance(sampling, _IN_SEGMENTS) and type(last.sampling) is type(sampling)
        if last and both and last.run != run:  # passes of two runs do not continue one another
            segment = self._segment = max(entry.segment for entry in self._history) + 1
        elif last and both and run and isinstance(sampling, CyclicPoisson):
            segment = last.segment  # the groups of a plan's run stay as they are over a restart
        entry = Entry(noise, sampling, count, segment, run, declared)
        if last and replace(entry, steps=last.steps) == last:
            self._history[-1] = replace(last, steps=last.steps + count)
        else:
            self._history.append(entry)
        self._steps += count

    def steps_of(self, run: str) -> int:
        """Return the number of steps that belong to one run of a plan."""
        return sum(entry.steps for entry in self._history if entry.run == run)

    def begin(self) -> None:
        """Declare that the next step begins a training run, or continues one after a restart.

        The next :class:`FixedSize` step then starts a new pass, because the order of the batches changes. If the last
        pass was unfinished, that costs up to one additional pass. The next :class:`CyclicPoisson` step starts a new
        round of all groups, unless it belongs to the run of a plan, which keeps its groups. For other sampling this
        method has no effect.
        """
        if self._history and isinstance(self._history[-1].sampling, _IN_SEGMENTS):
            self._segment = self._history[-1].segment + 1

    def epsilon(self, delta: float, *, group_size: int = 1) -> float:
        """Return the epsilon for which all recorded steps together are ``(epsilon, delta)`` differentially private.

        Args:
            delta: Probability with which epsilon may fail to hold, ``0 < delta < 1``.
            group_size: The largest number of samples of one person; neighbours then differ in all of them. Poisson
                sampling supports this with ``"pld"`` only, and not for ``"replace_one"``.

        Returns:
            A number of at least 0; infinite without noise, 0.0 without steps.

        Raises:
            ValueError: If a number is out of range, or the group cannot be accounted for.
            ImportError: If ``dp-accounting`` is not installed.
        """
        target = _checks.probability("delta", delta)
        return self._query("epsilon", target, group_size)

    def delta(self, epsilon: float, *, group_size: int = 1) -> float:
        """Return the delta for which all recorded steps together are ``(epsilon, delta)`` differentially private.

        Args:
            epsilon: A number of at least 0.
            group_size: As in :meth:`epsilon`.

        Returns:
            A number between 0 and 1; 1.0 without noise, 0.0 without steps.

        Raises:
            ValueError: If a number is out of range, or the group cannot be accounted for.
            ImportError: If ``dp-accounting`` is not installed.
        """
        return self._query("delta", _checks.at_least_0("epsilon", epsilon), group_size)

    def _query(self, asked: str, at: float, group_size: int) -> float:
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
            (entry.noise_multiplier, entry.sampling, entry.steps, entry.segment)
            for entry in self._history
        ]
        terms = terms_of(runs, relation=self._relation, group_size=size)
        within = self._backends.setdefault(size, backend(self._accountant))
        answer = (epsilon_of if asked == "epsilon" else delta_of)(terms, at, within)
        # Rounding may lower a bound, but steps released since have not made the run more private.
        answer = max(answer, before)
        self._answers[asked, at, size] = (self._steps, answer)
        return answer

    def _clear_cache(self) -> None:
        """Clear the caches: answers belong to one history, and the distributions behind them are large."""
        self._answers: dict[tuple[str, float, int], tuple[int, float]] = {}
        self._backends: dict[int, Backend] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the history as strings, lists and numbers, which load with ``weights_only=True``."""
        return {
            "kind": "Ledger",
            "format": 2,
            "relation": self._relation,
            "accountant": self._accountant,
            "history": list(map(entry_state, self._history)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the history by a saved history that continues it.

        The saved history must begin with all steps recorded here, since a release cannot be undone.

        Args:
            state: The result of :meth:`state_dict` of a ledger with the same relation and accountant.

        Raises:
            ValueError: If ``state`` is something else, or omits recorded steps; this ledger is unchanged then.
            TypeError: If a number in ``state`` has the wrong type; this ledger is unchanged then.
        """
        loaded = self.read(state)
        self._history, self._steps = loaded._history, loaded._steps
        self._segment = loaded._segment
        self._clear_cache()

    def read(self, state: Mapping[str, Any]) -> Ledger:
        """Return the ledger that :meth:`load_state_dict` would make of this one, without changing this one.

        This method takes the same argument and raises the same errors.
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
            loaded._segment = entry.segment
            loaded.record(
                entry.noise_multiplier,
                entry.sampling,
                entry.steps,
                run=entry.run,
                declared=entry.declared,
            )
        if not is_continuation(self._history, loaded._history):
            raise ValueError(
                f"state holds {loaded._steps} released steps and forgets some of the {self._steps} of this ledger: "
                "what was released in this process stays released. To return to earlier weights load the model's "
                "state alone; to resume after a restart load into a new ledger, or a new DPOptimizer of a new plan."
            )
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copy and pickle, without the caches."""
        return {**self.__dict__, "_answers": {}, "_backends": {}, "_history": list(self._history)}

    def __repr__(self) -> str:
        return (
            f"Ledger(relation={self._relation!r}, accountant={self._accountant!r}): "
            f"{self._steps} steps"
        )
