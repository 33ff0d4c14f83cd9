"""What is found in a model before each batch, kept as long as nothing that it depends on has changed."""

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

# Ways to walk a model. A module with one of its own may answer by something that is not looked at here.
_WALKS = (
    "modules", "named_modules", "parameters", "named_parameters", "_named_members", "children", "named_children",
)  # fmt: skip
_OF_MODULES = attrgetter(
    "training", "_parameters", "_modules", "_backward_hooks", "_backward_pre_hooks"
)
_OF_PARAMETERS = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")


class Resident(NamedTuple):
    """The whole parameters to train.

    Attributes:
        names: Their names.
        parameters: Themselves.
        holding: Puts other tensors in every place in the model that holds one.
    """

    names: list[str]
    parameters: list[Tensor]
    holding: Callable[[Sequence[Tensor]], AbstractContextManager[None]]


class TrainedParameters:
    """The parameters to train, by name, and every place in the model that holds one.

    A walk through a model costs as much as a small step. So what it found is kept together with all that it looked
    at, which ``holds`` reads again without a walk: each module's class, training flag, children, parameters and
    hooks, each parameter's ``requires_grad`` and hooks, and the optimizer's parameters. Any difference, even one that
    does not matter, takes a new survey, which is made as if there had been none before. Of a model with modules that
    are walked in a way of their own (TorchScript, a ``named_parameters`` of the user's) nothing is kept.

    Args:
        model: The model.
        owned: All parameters of the optimizer.

    Raises:
        ValueError: If the model cannot be trained with them; see ``parameters_to_train`` and ``ParameterSlots``.
        NotPerSampleError: Likewise.
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
        self._seen = self._look() if usual else None

    @contextmanager
    def resident(self, ranks: Ranks, step: int) -> Iterator[Resident]:
        """The whole parameters, in order, for as long as the body runs.

        Args:
            ranks: They gather the parameters if each process holds a part of them.
            step: Number of the step, which errors name.
        """
        with ranks.whole(self._model, step) as gathered:
            if gathered is None:
                yield Resident(self.names, self.parameters, self.slots.holding)
                return
            whole = gathered.whole_parameters(self.names)

            @contextmanager
            def holding(tensors: Sequence[Tensor]) -> Iterator[None]:
                with self.slots.guarded_buffers(), gathered.holding(whole, tensors):
                    yield

            yield Resident(self.names, whole, holding)

    def holds(self, model: nn.Module, owned: Sequence[Tensor]) -> bool:
        """Whether a survey that is made now would find the same."""
        return (
            self._seen is not None
            and model is self._model
            and _identical(owned, self._owned)
            and (now := self._look()) is not None
            and now.lengths == self._seen.lengths
            and _identical(now.objects, self._seen.objects)
        )

    def _look(self) -> _Look | None:
        """What the survey depends on, as it is now; None if it has hooks, or tables that cannot be read like this."""
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
        return _Look(
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


class _Look(NamedTuple):
    """Everything that a survey depends on, in a row."""

    lengths: list[int]
    """Entries of each module's tables of parameters and children."""
    objects: list[Any]
    """Names and entries of these tables, and what is asked of each of them; compared by identity."""


def _identical(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _is_walked_as_usual(module: nn.Module) -> bool:
    """Whether a module's tables say all that a walk through it would find."""
    return all(
        getattr(getattr(module, name), "__func__", None) is getattr(nn.Module, name)
        for name in _WALKS
    )
