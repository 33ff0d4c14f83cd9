"""Who trains together: how processes agree, add up norms and sums, and which of them noises which part.

Here is what any number of processes must do, and the process that trains alone. The others are in
``clipgrad.distributed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

Facts = Callable[[], Mapping[str, object]]
"""What every process must be doing the same way; a function, since only several processes compare it."""

NoiseState = Callable[[], Mapping[str, Any]]
"""The state of the noise source, of which each process must have another."""


def initialised() -> bool:
    """Return whether ``torch.distributed`` was initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world() -> tuple[int, int]:
    """Return rank and number of processes of ``torch.distributed``; ``(0, 1)`` if it was not initialised."""
    if not initialised():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Gathering(Protocol):
    """Parameters that are gathered for one batch."""

    def whole_parameters(self, names: Sequence[str]) -> list[Tensor]:
        """The whole parameters, by their names in the model."""
        ...

    def holding(
        self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> AbstractContextManager[None]:
        """Put ``tensors[i]`` in every place of whole parameter ``i`` while the body runs."""
        ...


class Share(Protocol):
    """The sums of a logical batch over all processes, of which each process noises a part.

    Attributes:
        parts: Totals over all processes, of the coordinates that this process noises. Nobody else holds them, unless
            the process trains alone.
        private: Whether nobody else holds ``parts``.
    """

    parts: list[Tensor]
    private: bool

    def places(self, names: Sequence[str]) -> list[str]:
        """For each part a name of its coordinates: equal for the same ones, and different for others.

        Args:
            names: Of the parameters.
        """
        ...

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """The noised means in the form of the parameters, from everybody's parts."""
        ...


class Ranks(Protocol):
    """The processes that train one model.

    Attributes:
        rank: Number of this process among them.
        size: How many there are.
        is_sharded: Whether each holds a part of every parameter.
    """

    rank: int
    size: int
    is_sharded: bool

    @property
    def before_recipe(self) -> Callable[[Sequence[Tensor]], None] | None:
        """Called with parameters whose values a recipe may read; None if they lie here in any case."""
        ...

    def prepare(self, model: nn.Module, facts: Facts, noise: NoiseState) -> None:
        """Start from the same parameters and settings, and from different noise, in every process.

        Args:
            model: The model.
            facts: Settings of the run.
            noise: Returns the state of the noise source.

        Raises:
            RanksError: If the processes differ where they must not, or share noise.
        """
        ...

    def same(self, value: str) -> str:
        """The value of the first process."""
        ...

    def meet(self, call: str, step: int, facts: Facts, parameters: Sequence[Tensor]) -> None:
        """Wait for every process to make the same call.

        Args:
            call: The method of the optimizer; with the step, it names where collectives fail from here on.
            step: Steps of the optimizer before this one.
            facts: What must be the same in every process.
            parameters: Those that are trained.

        Raises:
            RanksError: If a process makes another call, or differs in a fact or in its parameters.
        """
        ...

    def compare_soon(self) -> None:
        """Compare parameters and noise at the next step: something else than a step has changed them."""
        ...

    def whole(self, model: nn.Module, step: int) -> AbstractContextManager[Gathering | None]:
        """Gather parameters while the body runs; None if the model holds whole ones in any case."""
        ...

    def passes(self, own: int) -> int:
        """How many microbatches this process has to run, of which ``own`` have samples."""
        ...

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Prepare for the backward pass through a graph, of which the last nodes are given."""
        ...

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Clipped sums of a microbatch in the form in which they wait for ``step``.

        Args:
            totals: The sums of this process; each is formed when it is asked for.
            parameters: The whole parameters that they belong to.
        """
        ...

    def squared_norms(self, own: Tensor) -> Tensor:
        """Squared norms ``[B]`` of whole gradients, from those of the parameters that this process holds."""
        ...

    def share(
        self, sums: list[Tensor], parameters: Sequence[Tensor], *, aliases_graph: bool
    ) -> Share:
        """Return the totals over all processes; ``sums`` may be overwritten.

        ``aliases_graph`` says whether they alias the memory of a CUDA graph.
        """
        ...

    def one_draw(self, counts: list[Tensor], add_noise: Callable[[list[Tensor]], None]) -> None:
        """Replace counts by their totals over all processes with the noise of a single draw, equal in each."""
        ...


class Alone:
    """The share of a process that trains alone: everything."""

    def __init__(self, parts: list[Tensor], *, private: bool) -> None:
        self.parts = parts
        self.private = private

    def places(self, names: Sequence[str]) -> list[str]:
        """The parameters."""
        return list(names)

    def gathered(self, means: list[Tensor]) -> list[Tensor]:
        """All means."""
        return means


class OneProcess:
    """A process that trains alone: its norms, sums and noise are the whole."""

    rank = 0
    size = 1
    is_sharded = False
    before_recipe: Callable[[Sequence[Tensor]], None] | None = None

    def prepare(self, model: nn.Module, facts: Facts, noise: NoiseState) -> None:
        """Nothing can differ."""

    def same(self, value: str) -> str:
        """The value."""
        return value

    def meet(self, call: str, step: int, facts: Facts, parameters: Sequence[Tensor]) -> None:
        """Nobody to wait for."""

    def compare_soon(self) -> None:
        """Nothing to compare with."""

    def whole(self, model: nn.Module, step: int) -> AbstractContextManager[Gathering | None]:
        """The parameters are whole."""
        return _NOTHING

    def passes(self, own: int) -> int:
        """Its own."""
        return own

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Nothing to prepare."""

    def summed(self, totals: Iterator[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """The sums as they are."""
        return list(totals)

    def squared_norms(self, own: Tensor) -> Tensor:
        """The norms as they are."""
        return own

    def share(
        self, sums: list[Tensor], parameters: Sequence[Tensor], *, aliases_graph: bool
    ) -> Share:
        """All sums."""
        return Alone(sums, private=not aliases_graph)

    def one_draw(self, counts: list[Tensor], add_noise: Callable[[list[Tensor]], None]) -> None:
        """Add the noise."""
        add_noise(counts)


_NOTHING = nullcontext()
