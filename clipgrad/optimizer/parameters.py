"""This module finds the parameters to train, and repeats the search only after the model has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from clipgrad.optimizer.requirements import parameters_to_train
from clipgrad.optimizer.swap import ParameterSlots
from clipgrad.ranks import Ranks

# Methods that walk a model. A module that overrides one may depend on state that the snapshot does not contain.
_WALKS = (
    "modules", "named_modules", "parameters", "named_parameters", "_named_members", "children", "named_children",
)  # fmt: skip
_OF_MODULES = attrgetter(
    "training", "_parameters", "_modules", "_backward_hooks", "_backward_pre_hooks"
)
_OF_PARAMETERS = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")


class Resident(NamedTuple):
    """This class holds the whole parameters to train while a batch is processed.

    Attributes:
        names: Their names.
        parameters: Themselves.
        holding: Puts other tensors in every place in the model that holds one.
    """

    names: list[str]
    parameters: list[Tensor]
    holding: Callable[[Sequence[Tensor]], AbstractContextManager[None]]


class TrainedParameters:
    """This class holds the parameters to train, by name, and every place in the model that holds one of them.

    A walk through a model takes as long as a small step. So the result is cached together with a snapshot of all that
    the walk read: each module's class, training flag, children, parameters and hooks, each parameter's
    ``requires_grad`` and hooks, and the optimizer's parameters. ``holds`` compares the snapshot with the present state
    without a walk. Any difference makes the result invalid. Models with modules that override a method of the walk
    (TorchScript, a user's ``named_parameters``) are walked each time.

    Args:
        model: The model.
        owned: All parameters of the optimizer.

    Raises:
        ValueError: If the model cannot be trained; see ``parameters_to_train`` and ``ParameterSlots``.
        NotPerSampleError: If the model has BatchNorm in training mode, or hooks on gradients.
    """

    def __init__(self, model: nn.Module, owned: Sequence[Tensor]) -> None:
        self.selection = parameters_to_train(model, owned)
        self.names = [name for name, _ in self.selection]
        self.parameters: list[Tensor] = [parameter for _, parameter in self.selection]
        self.slots = ParameterSlots(model, self.parameters)
        self._model = model
        self._owned = owned
        self._modules = list(model.modules())
        self._recurrent = [m for m in self._modules if isinstance(m, nn.RNNBase)]
        usual = all(map(_is_walked_as_usual, self._modules))
        self._seen = self._snapshot() if usual else None

    @contextmanager
    def resident(self, ranks: Ranks, step: int) -> Iterator[Resident]:
        """Yield the whole parameters, in order.

        Args:
            ranks: They gather the parameters if each process holds a part of them.
            step: Number of the step, which errors name.
        """
        with ranks.gathered(self._model, step) as gathered:
            if gathered is None:
                yield Resident(self.names, self.parameters, self.slots.holding)
                return
            whole = gathered.whole_parameters(self.names)

            @contextmanager
            def holding(tensors: Sequence[Tensor]) -> Iterator[None]:
                with self.slots.guarded_buffers(), gathered.holding(whole, tensors):
                    yield

            yield Resident(self.names, whole, holding)

    def refreshed(self, model: nn.Module, owned: Sequence[Tensor]) -> TrainedParameters:
        """Return this object if nothing has changed since it was made, else a new one."""
        return self if self.holds(model, owned) else TrainedParameters(model, owned)

    def holds(self, model: nn.Module, owned: Sequence[Tensor]) -> bool:
        """Return whether a new search would find the same."""
        return (
            self._seen is not None
            and model is self._model
            and _identical(owned, self._owned)
            and (now := self._snapshot()) is not None
            and now.lengths == self._seen.lengths
            and _identical(now.objects, self._seen.objects)
        )

    def _snapshot(self) -> _Snapshot | None:
        """Return the present state that the search depends on; None if there are hooks or unusual tables."""
        training, parameters, children, hooks, pre_hooks = zip(
            *map(_OF_MODULES, self._modules), strict=True
        )
        if any(hooks) or any(pre_hooks) or set(map(type, parameters + children)) != {dict}:
            return None
        tensors = [p for p in chain.from_iterable(map(dict.values, parameters)) if p is not None]
        trained, hooks, later_hooks = zip(*map(_OF_PARAMETERS, tensors), strict=True)
        if any(hooks) or any(later_hooks):
            return None
        tables = parameters + children
        weights = [
            (name, getattr(module, name, None))
            for module in self._recurrent
            for name in module._flat_weights_names
        ]
        return _Snapshot(
            list(map(len, tables)),
            [
                *map(type, self._modules),
                *training,
                *trained,
                *chain.from_iterable(tables),
                *chain.from_iterable(map(dict.values, tables)),
                *chain.from_iterable(weights),
            ],
        )


class _Snapshot(NamedTuple):
    """This tuple holds everything that a search depends on."""

    lengths: list[int]
    """The number of entries in each module's tables of parameters and children."""
    objects: list[Any]
    """Names and entries of these tables, and their attributes; compared by identity."""


def _identical(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _is_walked_as_usual(module: nn.Module) -> bool:
    """Return whether a module's tables hold all that a walk through it finds."""
    return all(
        getattr(getattr(module, name), "__func__", None) is getattr(nn.Module, name)
        for name in _WALKS
    )
