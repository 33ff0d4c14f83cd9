"""Define what processes that train together must do, and implement it for a process that trains alone.

Processes agree on settings, add up norms and sums, and each of them adds noise to its part of the coordinates. The
implementations for several processes are in ``clipgrad.distributed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

Facts = Callable[[], Mapping[str, object]]
"""A function that returns values that must be equal in all processes; one process alone never calls it."""

NoiseState = Callable[[], Mapping[str, Any]]
"""A function that returns the state of the noise source, which must differ in each process."""


def initialised() -> bool:
    """Return whether ``torch.distributed`` is initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world() -> tuple[int, int]:
    """Return rank and number of processes of ``torch.distributed``, or ``(0, 1)`` if it is not initialised."""
    if not initialised():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@dataclass(frozen=True)
class Cost:
    """Bytes that training on several processes costs one of them.

    Attributes:
        kind: ``held`` or ``sent``.
        what: What is held or sent, and for how long or how often.
        size: Bytes.
    """

    kind: str
    what: str
    size: int


class Gathering(Protocol):
    """This class holds parameters that are gathered for one batch."""

    def whole_parameters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the whole parameters with these names in the model."""
        ...

    def holding(
        self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> AbstractContextManager[None]:
        """Put ``tensors[i]`` in every place of whole parameter ``i`` while the body runs."""
        ...


class Noised(Protocol):
    """This function makes noised means of sums. Noise with a state for each coordinate needs all sums at once."""

    @property
    def needs_all_sums(self) -> bool:
        """Return whether one call must get all sums of a step."""
        ...

    def __call__(
        self, sums: list[Tensor], names: Sequence[str], /, *, in_place: bool
    ) -> list[Tensor]:
        """Return ``(sums + noise) / divisor``.

        Args:
            sums: Sums over all processes.
            names: Where ``needs_all_sums``, names of each sum's coordinates. Other coordinates have other names.
            in_place: Whether to write the means to the memory of ``sums``.
        """
        ...


class Ranks(Protocol):
    """This class holds the processes that train one model.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        is_sharded: Whether each process holds a shard of every parameter.
        parameters_move: Whether whole parameters have other addresses at each batch.
        sums_leave: Whether ``summed`` hands sums on as they are formed, so that none may be formed twice.
    """

    rank: int
    size: int
    is_sharded: bool
    parameters_move: bool
    sums_leave: bool

    @property
    def within_batch(self) -> Ranks:
        """Return the processes that a microbatch needs: this one alone, if sums stay whole until the batch ends."""
        ...

    @property
    def before_recipe(self) -> Callable[[Sequence[Tensor]], None] | None:
        """Return a function to call with the parameters that a recipe may read, or None if none is needed."""
        ...

    def prepare(self, model: nn.Module, facts: Facts, noise: NoiseState) -> None:
        """Check that all processes have equal settings and different noise, and give them equal parameters.

        Args:
            model: The model.
            facts: Settings of the run.
            noise: Returns the state of the noise source.

        Raises:
            RanksError: If settings differ, or if two processes have the same noise.
        """
        ...

    def value_of_first(self, value: str) -> str:
        """Return the value of the first process."""
        ...

    def meet(self, call: str, step: int, facts: Facts, parameters: Sequence[Tensor]) -> None:
        """Wait for every process to make the same call.

        Args:
            call: Name of the optimizer's method; call and step are named when a later collective fails.
            step: Number of steps of the optimizer before this step.
            facts: Values that must be equal in every process.
            parameters: The trained parameters.

        Raises:
            RanksError: If a process makes another call, or differs in a fact or in its parameters.
        """
        ...

    def compare_soon(self) -> None:
        """Compare parameters and noise at the next step, since other code than a step has changed them."""
        ...

    def release(self, model: nn.Module) -> None:
        """Free whole parameters that a forward pass of other code has left in the model."""
        ...

    def gathered(self, model: nn.Module, step: int) -> AbstractContextManager[Gathering | None]:
        """Gather parameters while the body runs; the value is None if the parameters are always whole."""
        ...

    def passes(self, own: int) -> int:
        """Return the number of microbatches that this process must run, of which ``own`` have samples."""
        ...

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Prepare for the backward pass through the graph that ends with ``roots``."""
        ...

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return clipped sums of a microbatch in the form in which they are kept until ``step``.

        Args:
            totals: Sums of this process, computed one by one.
            parameters: The whole parameters of these sums.
        """
        ...

    def after_batch(self, sums: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return clipped sums of a batch in the form in which they are kept until ``step``.

        Args:
            sums: Sums of its microbatches; the list may be emptied.
            parameters: The whole parameters of these sums.
        """
        ...

    def squared_norms(self, own: Tensor) -> Tensor:
        """Return squared norms ``[B]`` of whole gradients from the norms ``own`` of this process's parameters."""
        ...

    def means(
        self,
        sums: list[Tensor],
        parameters: Sequence[Tensor],
        names: Sequence[str],
        noised: Noised,
        *,
        aliases_graph: bool,
    ) -> list[Tensor]:
        """Return the noised means over all processes, in the form of the parameters.

        Args:
            sums: Sums of this process, which may be overwritten; several processes empty the list.
            parameters: The trained parameters.
            names: Their names.
            noised: Adds noise to the part of the sums for which this process draws it.
            aliases_graph: Whether ``sums`` alias the memory of a CUDA graph.
        """
        ...

    def one_draw(self, counts: list[Tensor], add_noise: Callable[[list[Tensor]], None]) -> None:
        """Replace counts by their sums over all processes plus one draw of noise, equal in all processes."""
        ...

    def costs(
        self, parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> tuple[Cost, ...]:
        """What this process holds and sends because it is not alone.

        Args:
            parameters: The whole parameters that are trained.
            dtypes: In which their sums are formed.
        """
        ...


class OneProcess:
    """This process trains alone, so its norms, sums and noise are complete.

    Args:
        parameters_move: Whether parameters have other addresses at each batch.
    """

    rank = 0
    size = 1
    is_sharded = False
    sums_leave = False
    before_recipe: Callable[[Sequence[Tensor]], None] | None = None

    def __init__(self, *, parameters_move: bool = False) -> None:
        self.parameters_move = parameters_move

    @property
    def within_batch(self) -> OneProcess:
        """Return itself."""
        return self

    def prepare(self, model: nn.Module, facts: Facts, noise: NoiseState) -> None:
        """Do nothing, since there is no other process."""

    def value_of_first(self, value: str) -> str:
        """Return ``value``."""
        return value

    def meet(self, call: str, step: int, facts: Facts, parameters: Sequence[Tensor]) -> None:
        """Do nothing, since there is no other process."""

    def compare_soon(self) -> None:
        """Do nothing, since there is no other process."""

    def release(self, model: nn.Module) -> None:
        """Do nothing, since the parameters are whole."""

    def gathered(self, model: nn.Module, step: int) -> AbstractContextManager[Gathering | None]:
        """Do nothing, since the parameters are whole."""
        return _NOTHING

    def passes(self, own: int) -> int:
        """Return ``own``."""
        return own

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Do nothing, since there is nothing to gather."""

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums unchanged."""
        return list(totals)

    def after_batch(self, sums: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums unchanged."""
        return sums

    def squared_norms(self, own: Tensor) -> Tensor:
        """Return the norms unchanged."""
        return own

    def means(
        self,
        sums: list[Tensor],
        parameters: Sequence[Tensor],
        names: Sequence[str],
        noised: Noised,
        *,
        aliases_graph: bool,
    ) -> list[Tensor]:
        """Return the noised means of all sums."""
        return noised(sums, names, in_place=not aliases_graph)

    def one_draw(self, counts: list[Tensor], add_noise: Callable[[list[Tensor]], None]) -> None:
        """Add noise to ``counts`` in place."""
        add_noise(counts)

    def costs(
        self, parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> tuple[Cost, ...]:
        """Nothing."""
        return ()


_NOTHING = nullcontext()
