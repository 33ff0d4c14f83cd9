"""Noise that is correlated over steps: each step takes back a part of the noise of the steps before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipgrad.errors import PrivacyBudgetError
from clipgrad.factorisation.strategy import Strategy
from clipgrad.noise import checks
from clipgrad.noise.buffers import Buffers
from clipgrad.noise.keys import process
from clipgrad.noise.rows import Rows, add_and_divide
from clipgrad.noise.source import NoiseSource
from clipgrad.noise.system import by_device_and_noise_dtype, is_plain_system_noise

# On the CPU this many rows are made at once, and no more than there are past rows. Elsewhere and for other sources than
# the default, one: such a source may be asked to repeat itself step by step.
_MOST_AHEAD = 16


class _Coordinates(NamedTuple):
    """What the rows belong to. Noise of one coordinate must never take back that of another.

    Attributes:
        names: Names of the parameters.
        shapes: Their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]


class CorrelatedNoise:
    """Step t adds row t of ``C^-1 Z``, where Z is independent Gaussian noise and C a lower-triangular Toeplitz matrix.

    For b bands row t is ``z_t - c_1 row_{t-1} - ... - c_{b-1} row_{t-b+1}``, so the noise keeps the rows of the last
    ``b - 1`` steps; without bands it keeps some decaying sums of all rows. Whoever knows them can subtract noise that
    was published. They are part of :meth:`state_dict`, which is secret for that reason. Copies, unpickled objects and
    forked children begin without them, and refuse to continue a run.

    Args:
        source: Where independent draws come from.
        strategy: How rows follow from earlier rows, and how large Z is.
        accounting: Names how an accountant has to treat the steps.
    """

    secret = "the noise of past steps, with which a reader can subtract it from what those steps published"

    def __init__(self, source: NoiseSource, strategy: Strategy, accounting: str) -> None:
        self.source, self.accounting = source, accounting
        self._strategy = strategy
        assert strategy.column[0] == 1.0
        self._forget()

    def _forget(self) -> None:
        self._step: int | None = 0
        """Steps so far; None if a step failed halfway, so that nobody knows what it added."""
        self._sigma = 0.0
        self._coordinates = _Coordinates((), ())
        self._rows: dict[tuple[torch.device, torch.dtype], Rows | Buffers] = {}
        self._members: dict[tuple[torch.device, torch.dtype], Sequence[int]] = {}
        self._kinds: list[tuple[torch.device, torch.dtype]] = []
        self._loaded: dict[str, Tensor] = {}
        self._process = process()

    def next(
        self,
        sums: list[Tensor],
        step: int,
        *,
        names: Sequence[str],
        sigma: float,
        divisor: float,
        in_place: bool,
    ) -> list[Tensor]:
        """``(sums + row of this step) / divisor``.

        Args:
            sums: Clipped sums, which are used up.
            step: Number of the step, from 0.
            names: What the sums belong to: parameters, or the part of their coordinates that this process noises. They
                are the same in every step.
            sigma: Standard deviation of the independent noise, for a C whose columns have norm 1. It is the same in
                every step.
            divisor: A public constant.
            in_place: Return the tensors of ``sums``; else others, since ``sums`` alias memory of somebody else.

        Raises:
            PrivacyBudgetError: If the noise of the steps before is not known, so that this run cannot go on.
            ValueError: If the parameters or ``sigma`` are others than in the steps before.
        """
        scale = checks.scale("sigma", sigma) * self._strategy.scale
        targets = checks.targets(sums, scale) if scale else list(sums)
        self._require_continuation(step, _Coordinates(tuple(names), tuple(t.shape for t in sums)))
        if step and sigma != self._sigma:
            raise ValueError(
                f"noise: sigma is {sigma} at step {step} and was {self._sigma} before. Correlated noise is accounted "
                "for with one noise multiplier and one clipping norm for the whole run."
            )
        self._sigma = sigma
        with torch.no_grad():
            self._arrange(targets)
            self._step = None  # until the row is added, nobody may continue from here
            added = self._added(targets, scale, divisor, in_place=in_place)
        self._step = step + 1
        return added

    def _added(
        self, sums: list[Tensor], scale: float, divisor: float, *, in_place: bool
    ) -> list[Tensor]:
        results = sums if in_place else [total.clone() for total in sums]
        for key, rows in self._rows.items():
            members = [results[index] for index in self._members[key]]
            add_and_divide(members, rows.next(self.source, scale), divisor)
        return results

    def _require_continuation(self, step: int, coordinates: _Coordinates) -> None:
        if self._step != step or (step and self._process != process()):
            raise PrivacyBudgetError(
                f"step {step}: the noise of the steps before it is not known here, but this plan's noise takes it "
                "back, so the run cannot go on. It is lost in a copied or unpickled optimizer, in a forked process, "
                "after a step that failed, or if only a part of a checkpoint is loaded. Load a whole checkpoint, or "
                "begin another run with plan=another_plan.continuing(optimizer.ledger)."
            )
        if step == 0:
            self._forget()
            self._coordinates = coordinates
        elif coordinates != self._coordinates:
            raise ValueError(
                f"step {step}: the trained parameters are {_listed(coordinates)}, but were "
                f"{_listed(self._coordinates)} in the steps before. Correlated noise belongs to its "
                "parameter for the whole run. Do not freeze, add or rename parameters under this plan. Of several "
                "processes each continues the checkpoint that it wrote itself, and their number stays the same."
            )

    def _arrange(self, sums: list[Tensor]) -> None:
        """Make sure that the rows lie where the sums do."""
        kinds = [(total.device, total.dtype) for total in sums]
        if kinds == self._kinds:
            return
        self._kinds = kinds
        members = by_device_and_noise_dtype(sums)
        past = self._loaded or self._past()
        self._rows, self._members, self._loaded = {}, members, {}
        for (device, dtype), indices in members.items():
            names = [self._coordinates.names[index] for index in indices]
            shapes = [self._coordinates.shapes[index] for index in indices]
            flat: list[Tensor] = []
            if past:
                parts = [past[name].to(device, dtype).flatten(1) for name in names]
                flat = list(torch.cat(parts, 1))
            self._rows[device, dtype] = self._made(
                flat, shapes, torch.empty(0, device=device, dtype=dtype)
            )

    def _made(self, past: list[Tensor], shapes: list[torch.Size], like: Tensor) -> Rows | Buffers:
        column, _, weights, decays = self._strategy
        if weights:
            return Buffers(weights, decays, past, shapes, like)
        tail = column[1:]
        plain = is_plain_system_noise(self.source) and like.device.type == "cpu"
        ahead = max(1, min(len(tail), _MOST_AHEAD)) if plain else 1
        return Rows(tail, past, shapes, like, ahead)

    def _past(self) -> dict[str, Tensor]:
        """Return the rows of past steps by name, oldest first: ``[rows, *shape]``."""
        names, shapes = self._coordinates
        found: dict[str, Tensor] = {}
        for key, rows in self._rows.items():
            members = self._members[key]
            past = rows.past()
            if not past:
                continue
            parts = torch.stack(past).split([shapes[index].numel() for index in members], 1)
            for index, part in zip(members, parts, strict=True):
                found[names[index]] = part.reshape(-1, *shapes[index]).clone()
        return found

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Refuse: no accounting of counts beside correlated noise is proven.

        Raises:
            ValueError: Always.
        """
        raise ValueError("noise: correlated noise excludes counts, and so adaptive clipping norms.")

    def change_source(self, source: NoiseSource) -> None:
        """Take independent draws from another source, from the next step on."""
        self._loaded = self._loaded or self._past()
        # The next step arranges the rows anew, without those that the other source made ahead.
        self._rows, self._members, self._kinds = {}, {}, []
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        """Return the noise of past steps and the source's state; **secret**.

        Raises:
            PrivacyBudgetError: If a step failed halfway.
        """
        if self._step is None:
            raise PrivacyBudgetError(
                "state_dict: a step failed while its noise was added, so this run cannot be continued."
            )
        return {
            "kind": "CorrelatedNoise",
            "format": 1,
            "accounting": self.accounting,
            "strategy": _state_of(self._strategy),
            "step": self._step,
            "sigma": self._sigma,
            "names": list(self._coordinates.names),
            "shapes": [list(shape) for shape in self._coordinates.shapes],
            "past": dict(self._loaded) or self._past(),
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved step, with the saved coefficients and rows.

        Raises:
            ValueError: If the state is of other noise, or incomplete.
        """
        checks.require_state(state, "CorrelatedNoise")
        strategy = _strategy_from(state["strategy"], self._strategy)
        if state["accounting"] != self.accounting or strategy is None:
            raise ValueError(
                f"state is of {state['accounting']} noise, but the plan has {self.accounting} noise. Build the plan "
                "as it was when it was saved."
            )
        names, step = list(state["names"]), int(state["step"])
        past: dict[str, Tensor] = dict(state["past"])
        wanted = min(step, self._strategy.kept)
        if self._strategy.weights and step:
            wanted = self._strategy.kept
        shapes = [torch.Size(shape) for shape in state["shapes"]]
        expected = [(wanted, *shape) for shape in shapes] if wanted else []
        if [tuple(past[name].shape) for name in names if name in past] != expected:
            raise ValueError(
                f"state is of step {step} and must hold the noise of {wanted} steps for each of {len(names)} "
                "parameters; load it as it was saved."
            )
        self._forget()
        self.source.load_state_dict(state["source"])
        # The coefficients of the noise so far, which another version of SciPy may not find to the last digit.
        self._strategy = strategy
        self._step, self._sigma = step, float(state["sigma"])
        self._coordinates = _Coordinates(tuple(names), tuple(shapes))
        self._loaded = {name: tensor.clone() for name, tensor in past.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copy and pickle, without the rows: two runs must not share them."""
        return {"source": self.source, "accounting": self.accounting, "_strategy": self._strategy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _state_of(strategy: Strategy) -> list[Any]:
    """Return what defines the noise: the column only if it has bands, since it is as long as the run otherwise."""
    column = [] if strategy.weights else list(strategy.column)
    return [column, strategy.scale, list(strategy.weights), list(strategy.decays)]


def _strategy_from(state: Any, own: Strategy) -> Strategy | None:
    """Return a saved strategy of the same form as ``own``, or None."""
    column, scale, weights, decays = state
    bands = 0 if own.weights else len(own.column)
    if [len(column), len(weights), len(decays)] != [bands, len(own.weights), len(own.decays)]:
        return None
    return Strategy(tuple(column or own.column), float(scale), tuple(weights), tuple(decays))


def _listed(coordinates: _Coordinates) -> str:
    some = [f"{name} {tuple(shape)}" for name, shape in list(zip(*coordinates, strict=True))[:4]]
    return ", ".join(some) + (", ..." if len(coordinates.names) > 4 else "")
