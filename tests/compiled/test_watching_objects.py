"""Attributes of objects, modules and classes: a change of each is noticed."""

from __future__ import annotations

import contextlib
import enum
import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

from clipgrad.compiled.state import same
from tests.compiled.watching import Cases, Config, Empty, assert_noticed, watched

cases = Cases()
noticed, refused = cases.noticed, cases.refused


# Not as constants of the code that reads them.
ALPHA, BETA = "alpha", "beta"


class Derived(Config):
    pass


class Slotted:
    __slots__ = ("__private", "beta")

    def get(self) -> float:
        return self.__private

    def put(self, value: float) -> None:
        self.__private = value


class Bare:
    __slots__ = ()
    beta = 0.0


class Number(float):
    beta = 0.0


class Table(dict):  # type: ignore[type-arg]
    beta = 0.0


class Optional(nn.Linear):
    def forward(self, x: Any) -> Any:
        return x * getattr(self, "gain", 1.0) if hasattr(self, "mask") else x


class MadeUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = 0.0

    def forward(self) -> Any:
        return getattr(self, BETA)


@noticed
def instance_hides_a_class_attribute() -> Any:
    thing = Config()
    return lambda: thing.beta, lambda: setattr(thing, "beta", 1.0)


@noticed
def instance_hides_a_method() -> Any:
    thing = Config()
    return lambda: thing.weight(), lambda: setattr(thing, "weight", lambda: 1.0)


@noticed
def instance_hides_what_its_method_reads() -> Any:
    thing = Config()
    return thing.weight, lambda: setattr(thing, "beta", 1.0)


@noticed
def getattr_with_a_default() -> Any:
    thing = Empty()
    return lambda: getattr(thing, "later", 0.0), lambda: setattr(thing, "later", 1.0)


@noticed
def hasattr_of_a_namespace() -> Any:
    thing = types.SimpleNamespace()
    return lambda: hasattr(thing, "later"), lambda: setattr(thing, "later", 1.0)


@noticed
def attribute_error() -> Any:
    thing = Empty()

    def read() -> float:
        with contextlib.suppress(AttributeError):
            return thing.later  # type: ignore[attr-defined, no-any-return]
        return 0.0

    return read, lambda: setattr(thing, "later", 1.0)


@noticed
def getattr_of_a_module() -> Any:
    net, x = Optional(1, 1), torch.ones(1)
    return lambda: net(x), lambda: setattr(net, "gain", 3.0)


@noticed
def hasattr_of_a_module() -> Any:
    net, x = Optional(1, 1), torch.ones(1)
    return lambda: net(x), lambda: setattr(net, "mask", 3.0)


@noticed
def buffer_of_a_module() -> Any:
    net, x = Optional(1, 1), torch.ones(1)
    return lambda: net(x), lambda: net.register_buffer("mask", torch.zeros(1))


@noticed
def forward_of_one_module() -> Any:
    net, x = nn.Linear(1, 1), torch.ones(1)
    return lambda: net(x), lambda: setattr(net, "forward", lambda x: 2 * x)


@noticed
def made_up_name_of_a_module() -> Any:
    net = MadeUp()
    return lambda: net(), lambda: setattr(net, "beta", 1.0)


@noticed
def order_of_the_modules() -> Any:
    net, x = nn.Sequential(nn.Tanh(), nn.ReLU()), torch.ones(1)
    first = "0"
    return lambda: net(x), lambda: net._modules.update({first: net._modules.pop(first)})


@noticed
def another_dictionary() -> Any:
    thing = Config()
    thing.beta = 0.0
    return lambda: thing.beta, lambda: setattr(thing, "__dict__", {"beta": 1.0})


@noticed
def subclass_attribute() -> Any:
    kind = type("Local", (Config,), {"__module__": __name__})
    return lambda: kind.beta, lambda: setattr(kind, "beta", 1.0)  # type: ignore[attr-defined]


@noticed
def subclass_attribute_by_an_instance() -> Any:
    kind = type("Local", (Config,), {"__module__": __name__})
    thing = kind()
    return lambda: thing.beta, lambda: setattr(kind, "beta", 1.0)


@noticed
def later_class_attribute() -> Any:
    kind = type("Local", (), {"__module__": __name__})
    return lambda: getattr(kind, "beta", 0.0), lambda: setattr(kind, "beta", 1.0)


@noticed
def class_attribute_by_a_made_up_name() -> Any:
    kind = type("Local", (), {"__module__": __name__, "beta": 0.0})
    return lambda: getattr(kind, BETA), lambda: setattr(kind, "beta", 1.0)


@noticed
def class_without_dictionary() -> Any:
    kind = type("Local", (), {"__module__": __name__, "__slots__": (), "beta": 0.0})
    thing = kind()
    return lambda: thing.beta, lambda: setattr(kind, "beta", 1.0)


@noticed
def special_method_replaced() -> Any:
    kind = type("Local", (), {"__module__": __name__, "__float__": lambda self: 0.0})
    thing = kind()
    return lambda: float(thing), lambda: setattr(kind, "__float__", lambda self: 1.0)


@noticed
def special_method_appears() -> Any:
    kind = type("Local", (), {"__module__": __name__})
    thing = kind()
    return lambda: bool(thing), lambda: setattr(kind, "__bool__", lambda self: False)


@noticed
def attribute_made_by_getattr() -> Any:
    kind = type("Local", (), {"__module__": __name__})
    thing = kind()
    return (
        lambda: getattr(thing, "beta", 0.0),
        lambda: setattr(kind, "__getattr__", lambda self, name: 1.0),
    )


@noticed
def metaclass_attribute() -> Any:
    meta = type("Meta", (type,), {"__module__": __name__, "beta": 0.0})
    kind = meta("Local", (), {"__module__": __name__})
    return lambda: kind.beta, lambda: setattr(meta, "beta", 1.0)


@noticed
def slot_unset_at_first() -> Any:
    thing = Slotted()
    return lambda: getattr(thing, "beta", 0.0), lambda: setattr(thing, "beta", 1.0)


@noticed
def private_slot() -> Any:
    thing = Slotted()
    thing.put(0.0)
    return thing.get, lambda: thing.put(1.0)


@noticed
def attribute_of_a_number() -> Any:
    number = Number(1.0)
    return lambda: number.beta, lambda: setattr(number, "beta", 1.0)


@noticed
def attribute_of_a_table() -> Any:
    table = Table()
    return lambda: table.beta, lambda: setattr(table, "beta", 1.0)


@noticed
def attribute_of_a_member() -> Any:
    kind = enum.Enum("kind", ["A", "B"])
    return lambda: getattr(kind.A, "beta", 0.0), lambda: setattr(kind.A, "beta", 1.0)


@pytest.mark.parametrize("case", cases.all_noticed)
def test_change_is_noticed(case: str) -> None:
    assert_noticed(cases.all_noticed[case])


def test_names_that_nobody_mentions_may_come_and_go() -> None:
    thing, net, x = Config(), Optional(1, 1), torch.ones(1)
    table = functools.cache(lambda key: key)

    def read() -> Any:
        return thing.beta, net(x), table(1)

    state = watched(read)
    thing.unrelated = net.unrelated = read.unrelated = 1  # type: ignore[attr-defined, assignment]
    globals()["UNRELATED"] = 1
    table(2)
    try:
        assert state.change() is None
    finally:
        del globals()["UNRELATED"]


def test_what_torch_dynamo_replaces_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first graph of a process would be made twice."""
    net, x = Optional(1, 1), torch.ones(1)

    def read() -> Any:
        return net(x), net.__init__, net.__setstate__  # type: ignore[misc]

    state = watched(read)
    for name in ("__init__", "__setstate__"):
        before = getattr(nn.Module, name)
        monkeypatch.setattr(nn.Module, name, lambda *given, before=before: before(*given))
    assert state.change() is None


def test_message_names_what_appeared() -> None:
    thing = Config()
    state = watched(lambda: thing.beta)
    thing.beta = 1.0
    assert state.change() == "thing.beta (absent -> 1.0)"


def test_equal_values_with_attributes_of_their_own_are_not_the_same() -> None:
    assert not same(Number(1.0), Number(1.0))
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
