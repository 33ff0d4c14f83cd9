"""Add noise that is correlated over steps: each step subtracts a part of the noise of earlier steps."""

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
from clipgrad.noise.rows import Rows
from clipgrad.noise.source import NoiseSource
from clipgrad.noise.step_noise import StepSums
from clipgrad.noise.sums import noised
from clipgrad.noise.system import by_device_and_noise_dtype, is_plain_system_noise


class _Coordinates(NamedTuple):
    """These names and shapes say which coordinate each value of a row belongs to.

    A coordinate's noise must subtract only past noise of the same coordinate.

    Attributes:
        names: Names of the parameters.
        shapes: Shapes of the parameters.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]


class CorrelatedNoise:
    """Step t adds row t of ``C^-1 Z``, where Z is independent Gaussian noise and C a lower-triangular Toeplitz matrix.

    For b bands row t is ``z_t - c_1 row_{t-1} - ... - c_{b-1} row_{t-b+1}``, so the noise keeps the rows of the last
    ``b - 1`` steps. Without bands it keeps a few decaying sums of all rows. A reader of the kept tensors can remove
    noise from published parameters, so :meth:`state_dict`, which holds them, is secret. Copies, unpickled objects and
    forked processes do not have the kept tensors, and refuse to continue a run.

    Args:
        source: The source of the independent noise Z.
        strategy: The matrix C and the standard deviation of Z.
        accounting: The name of the way in which an accountant must treat the steps.
    """

    needs_all_sums = True
    secret = "the noise of past steps, with which a reader can subtract it from what those steps published"

    def __init__(self, source: NoiseSource, strategy: Strategy, accounting: str) -> None:
        self.source, self.accounting = source, accounting
        self._strategy = strategy
        assert strategy.column[0] == 1.0
        self._forget()

    def _forget(self) -> None:
        self._step: int | None = 0
        """Number of finished steps; None after a step that failed, since the noise that it added is unknown."""
        self._sigma = 0.0
        self._coordinates = _Coordinates((), ())
        self._rows: dict[tuple[torch.device, torch.dtype], Rows | Buffers] = {}
        self._members: dict[tuple[torch.device, torch.dtype], Sequence[int]] = {}
        self._kinds: list[tuple[torch.device, torch.dtype]] = []
        self._loaded: dict[str, Tensor] = {}
        self._process = process()

    def next(self, step: StepSums) -> list[Tensor]:
        """Return ``(sums + row of this step) / divisor``; names and sigma must be the same in every step.

        Raises:
            PrivacyBudgetError: If the noise of earlier steps is not known here, so that the run cannot continue.
            ValueError: If the parameters or ``sigma`` differ from those of earlier steps.
        """
        sums, sigma = step.sums, step.sigma
        scale = checks.scale("sigma", sigma) * self._strategy.scale
        targets = checks.targets(sums, scale) if scale else list(sums)
        shapes = tuple(total.shape for total in sums)
        self._require_continuation(step.number, _Coordinates(tuple(step.names), shapes))
        if step.number and sigma != self._sigma:
            raise ValueError(
                f"noise: sigma is {sigma} at step {step.number} and was {self._sigma} before. Correlated noise is "
                "accounted for with one noise multiplier and one clipping norm for the whole run."
            )
        self._sigma = sigma
        with torch.no_grad():
            self._arrange(targets)
            self._step = None  # A step that fails below must not be continued.
            added = self._added(targets, scale, step.divisor, in_place=step.in_place)
        self._step = step.number + 1
        return added

    def _added(
        self, sums: list[Tensor], scale: float, divisor: float, *, in_place: bool
    ) -> list[Tensor]:
        results = list(sums)
        for key, rows in self._rows.items():
            members = self._members[key]
            row = rows.next(self.source, scale)
            found = noised([sums[index] for index in members], row, divisor, in_place=in_place)
            for index, result in zip(members, found, strict=True):
                results[index] = result
        return results

    def _require_continuation(self, step: int, coordinates: _Coordinates) -> None:
        if self._step != step or (step and self._process != process()):
            raise PrivacyBudgetError(
                f"step {step}: the noise of the earlier steps is not known here, and this plan's noise depends on it, "
                "so the run cannot go on. It is lost in a copied or unpickled optimizer, in a forked process, "
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
        """Move the rows to the devices and dtypes of the sums if these have changed."""
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
                kept = [past[name].to(device, dtype) for name in names]
                flat = list(torch.cat([p.reshape(len(p), p.shape[1:].numel()) for p in kept], 1))
            self._rows[device, dtype] = self._made(
                flat, shapes, torch.empty(0, device=device, dtype=dtype)
            )

    def _made(self, past: list[Tensor], shapes: list[torch.Size], like: Tensor) -> Rows | Buffers:
        column, _, weights, decays = self._strategy
        if weights:
            return Buffers(weights, decays, past, shapes, like)
        tail = column[1:]
        # With other sources each step makes one row, since a user may repeat such a source step by step.
        source = self.source
        ahead = source._rows_ahead(tail, like) if is_plain_system_noise(source) else 1
        return Rows(tail, past, shapes, like, ahead)

    def _past(self) -> dict[str, Tensor]:
        """Return the rows of past steps for each parameter's name, oldest first, as ``[rows, *shape]``."""
        names, shapes = self._coordinates
        found: dict[str, Tensor] = {}
        for key, rows in self._rows.items():
            members = self._members[key]
            past = rows.past()
            if not past:
                continue
            parts = torch.stack(past).split([shapes[index].numel() for index in members], 1)
            for index, part in zip(members, parts, strict=True):
                found[names[index]] = part.reshape(len(past), *shapes[index]).clone()
        return found

    def count(self, counts: Sequence[Tensor], sigma: float) -> None:
        """Refuse noisy counts, since no accounting of counts together with correlated noise is proven.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "noise: correlated noise does not allow adaptive clipping norms, whose noisy counts have no proven "
            "accounting beside it. Use a fixed max_grad_norm, or a plan without mechanism=."
        )

    def change_source(self, source: NoiseSource) -> None:
        """Use another source of independent noise from the next step on."""
        self._loaded = self._loaded or self._past()
        # The next step arranges the rows again, without the rows that the old source made ahead.
        self._rows, self._members, self._kinds = {}, {}, []
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        """Return the noise of past steps and the source's state, which are **secret**.

        Raises:
            PrivacyBudgetError: If a step failed while it added noise.
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
            ValueError: If the state belongs to other noise or is incomplete.
        """
        checks.require_state(state, "CorrelatedNoise")
        strategy = _strategy_from(state["strategy"], self._strategy)
        if state["accounting"] != self.accounting or strategy is None:
            raise ValueError(
                f"the saved state belongs to {state['accounting']} noise, but this plan's noise is {self.accounting} "
                "noise or has other coefficients. Build the plan with the arguments of the saved run."
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
                f"the saved state is of step {step} and must hold {wanted} tensors of past noise for each of "
                f"{len(names)} parameters, but some are missing or have another shape. Load the state unchanged."
            )
        self._forget()
        self.source.load_state_dict(state["source"])
        # Past rows have the saved coefficients. Another version of SciPy may find others in the last digits.
        self._strategy = strategy
        self._step, self._sigma = step, float(state["sigma"])
        self._coordinates = _Coordinates(tuple(names), tuple(shapes))
        self._loaded = {name: tensor.clone() for name, tensor in past.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copy and pickle without the rows, since two runs must not share rows."""
        return {"source": self.source, "accounting": self.accounting, "_strategy": self._strategy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _state_of(strategy: Strategy) -> list[Any]:
    """Return the numbers that define C; a column without bands is left out, since it is as long as the run."""
    column = [] if strategy.weights else list(strategy.column)
    return [column, strategy.scale, list(strategy.weights), list(strategy.decays)]


def _strategy_from(state: Any, own: Strategy) -> Strategy | None:
    """Return the saved strategy, or None if its numbers of bands and buffers differ from those of ``own``."""
    column, scale, weights, decays = state
    bands = 0 if own.weights else len(own.column)
    if [len(column), len(weights), len(decays)] != [bands, len(own.weights), len(own.decays)]:
        return None
    return Strategy(tuple(column or own.column), float(scale), tuple(weights), tuple(decays))


def _listed(coordinates: _Coordinates) -> str:
    some = [f"{name} {tuple(shape)}" for name, shape in list(zip(*coordinates, strict=True))[:4]]
    return ", ".join(some) + (", ..." if len(coordinates.names) > 4 else "")
