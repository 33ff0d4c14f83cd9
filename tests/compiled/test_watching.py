"""Each way in which Python code can find another value than before is noticed, or refused; without a graph."""

from __future__ import annotations

import builtins
import collections
import contextlib
import ctypes
import enum
import functools
import importlib
import logging
import multiprocessing
import operator
import os
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from clipgrad import CompileError
from clipgrad.compiled._observe import Observer
from clipgrad.compiled._state import State, same
from clipgrad.compiled._walk import write_down

Read = Callable[[], Any]
# Not as constants of the code that reads them.
ALPHA, BETA = "alpha", "beta"
Case = Callable[[], tuple[Read, Callable[[], Any]]]
NOTICED: dict[str, Case] = {}
REFUSED: dict[str, Case] = {}


def noticed(case: Case) -> Case:
    NOTICED[case.__name__] = case
    return case


def refused(case: Case) -> Case:
    REFUSED[case.__name__] = case
    return case


def watched(read: Read) -> State:
    """What is written down of a function after it ran."""
    observer = Observer()
    read()
    with observer as seen:
        read()
    seen.forget_temporaries()
    state = write_down(seen, {"loss": read})
    assert state.change() is None
    return state


class Config:
    """Without attributes of its own: everything is a default of the class."""

    beta = 0.0

    def weight(self) -> float:
        return self.beta


class Empty:
    pass


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


class Named(NamedTuple):
    beta: float


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
def attribute_of_a_function() -> Any:
    def read() -> Any:
        return read.beta  # type: ignore[attr-defined]

    read.beta = 0.0  # type: ignore[attr-defined]
    return read, lambda: setattr(read, "beta", 1.0)


@noticed
def later_attribute_of_a_function() -> Any:
    def read() -> Any:
        return getattr(read, "beta", 0.0)

    return read, lambda: setattr(read, "beta", 1.0)


@noticed
def attribute_of_a_function_that_did_not_run() -> Any:
    def other() -> None: ...

    return lambda: getattr(other, "beta", 0.0), lambda: setattr(other, "beta", 1.0)


@noticed
def attribute_of_the_function_of_a_method() -> Any:
    def other(self: Any) -> None: ...

    method = types.MethodType(other, Empty())
    return lambda: getattr(method, "beta", 0.0), lambda: setattr(other, "beta", 1.0)


@noticed
def attribute_of_a_partial() -> Any:
    part = functools.partial(max, 1)
    return lambda: getattr(part, "beta", 0.0), lambda: setattr(part, "beta", 1.0)


@noticed
def code_of_a_function() -> Any:
    def weight() -> float:
        return 0.0

    return lambda: weight(), lambda: setattr(weight, "__code__", (lambda: 1.0).__code__)


@noticed
def keyword_default() -> Any:
    def weight(*, beta: float = 0.0) -> float:
        return beta

    return lambda: weight(), lambda: weight.__kwdefaults__.update(beta=1.0)


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


@noticed
def later_global() -> Any:
    return lambda: globals().get("LATER", 0.0), lambda: globals().__setitem__("LATER", 1.0)


@noticed
def name_error() -> Any:
    def read() -> float:
        with contextlib.suppress(NameError):
            return LATER  # type: ignore[name-defined, no-any-return] # noqa: F821
        return 0.0

    return read, lambda: globals().__setitem__("LATER", 1.0)


@noticed
def global_hides_a_builtin() -> Any:
    return lambda: abs(-1.0), lambda: globals().__setitem__("abs", lambda value: 2.0)


@noticed
def builtin_replaced() -> Any:
    return lambda: LATER_BUILTIN(-1.0), lambda: setattr(builtins, "LATER_BUILTIN", len)  # type: ignore[name-defined] # noqa: F821


@noticed
def object_of_a_global_by_a_made_up_name() -> Any:
    return lambda: getattr(CONFIG, ALPHA), lambda: setattr(CONFIG, "alpha", 1.0)


@noticed
def module_that_the_loss_imports() -> Any:
    module = sys.modules["imported_by_the_loss"] = types.ModuleType("imported_by_the_loss")
    module.beta = 0.0  # type: ignore[attr-defined]

    def read() -> Any:
        import imported_by_the_loss  # type: ignore[import-not-found]

        return imported_by_the_loss.beta

    return read, lambda: setattr(module, "beta", 1.0)


@noticed
def module_that_importlib_finds() -> Any:
    module = sys.modules["imported_by_the_loss"] = types.ModuleType("imported_by_the_loss")
    return (
        lambda: getattr(importlib.import_module("imported_by_the_loss"), "beta", 0.0),
        lambda: setattr(module, "beta", 1.0),
    )


@noticed
def function_of_a_library() -> Any:
    before = torch.nn.functional.relu
    return (
        lambda: torch.nn.functional.relu(torch.ones(1)),
        lambda: (
            setattr(torch.nn.functional, "relu", lambda x: x),
            globals().__setitem__("UNDO", lambda: setattr(torch.nn.functional, "relu", before)),
        ),
    )


@noticed
def list_of_a_library() -> Any:
    return lambda: len(sys.argv), lambda: sys.argv.append("more")


@noticed
def environment_variable() -> Any:
    os.environ["CLIPGRAD_TEST"] = "0"
    return lambda: os.environ["CLIPGRAD_TEST"], lambda: os.environ.update(CLIPGRAD_TEST="1")


@noticed
def later_environment_variable() -> Any:
    return lambda: os.getenv("CLIPGRAD_TEST"), lambda: os.environ.update(CLIPGRAD_TEST="1")


@noticed
def level_of_a_logger() -> Any:
    logger = logging.getLogger("watched.by.a.test")
    logger.parent.setLevel(10)  # type: ignore[union-attr]
    return lambda: logger.isEnabledFor(15), lambda: logger.parent.setLevel(30)  # type: ignore[union-attr]


def _cached(size: int | None) -> Any:
    table = {"beta": 0.0}

    @functools.lru_cache(size)
    def beta(unused: int = 0) -> float:
        return table["beta"]

    beta()

    def change() -> None:
        table["beta"] = 1.0
        beta.cache_clear()
        beta()

    return lambda: beta(), change


@noticed
def cache_cleared() -> Any:
    return _cached(None)


@noticed
def bounded_cache_cleared() -> Any:
    return _cached(8)


@noticed
def attribute_of_a_cached_function() -> Any:
    beta = functools.cache(lambda: 0.0)
    return lambda: getattr(beta, "gamma", 0.0), lambda: setattr(beta, "gamma", 1.0)


@noticed
def place_of_a_full_cache_used_again() -> Any:
    table = {"beta": 0.0}

    @functools.lru_cache(1)
    def beta(key: int) -> float:
        return table["beta"]

    def change() -> None:
        table["beta"] = 1.0
        beta(2)
        beta(1)

    return lambda: beta(1), change


@noticed
def weak_reference() -> Any:
    thing = Empty()
    thing.beta = 0.0  # type: ignore[attr-defined]
    reference = weakref.ref(thing)
    return lambda: reference().beta, lambda: setattr(thing, "beta", 1.0)  # type: ignore[union-attr]


@noticed
def chain_of_maps() -> Any:
    front: dict[str, float] = {}
    chain = collections.ChainMap(front, {"beta": 0.0})
    return lambda: chain["beta"], lambda: front.update(beta=1.0)


@noticed
def user_dictionary() -> Any:
    table: collections.UserDict[str, float] = collections.UserDict(beta=0.0)
    return lambda: table["beta"], lambda: table.update(beta=1.0)


@noticed
def single_dispatch() -> Any:
    @functools.singledispatch
    def weight(value: Any) -> float:
        return 0.0

    return lambda: weight(1), lambda: weight.register(int, lambda value: 1.0)


@noticed
def missing_key() -> Any:
    table: dict[str, float] = {}
    return lambda: table.get("beta", 0.0), lambda: table.update(beta=1.0)


@noticed
def key_in_the_place_of_another() -> Any:
    table = {"alpha": 0.0}
    return lambda: table.get("beta", 0.0), lambda: (table.clear(), table.update(beta=0.0))


@noticed
def order_of_keys() -> Any:
    table = {"alpha": 0.0, "beta": 1.0}
    return lambda: next(iter(table.values())), lambda: table.update(alpha=table.pop("alpha"))


@noticed
def default_factory() -> Any:
    table: Any = collections.defaultdict(float)
    table["alpha"] = 0.0
    return lambda: table["alpha"], lambda: setattr(table, "default_factory", lambda: 1.0)


@noticed
def member_of_a_set() -> Any:
    members = {1}
    return lambda: 2 in members, lambda: (members.remove(1), members.add(2))


@noticed
def list_that_grows() -> Any:
    values = [0.0]
    return lambda: sum(values), lambda: values.append(1.0)


@noticed
def field_of_a_named_tuple() -> Any:
    values = [Named(0.0)]
    return lambda: values[0].beta, lambda: values.__setitem__(0, Named(1.0))


@refused
def weak_proxy() -> Any:
    thing = Config()
    proxy = weakref.proxy(thing)
    return lambda: (proxy.beta, thing), None


@refused
def shared_value() -> Any:
    value = multiprocessing.Value("d", 0.0)
    return lambda: value.value, None


@refused
def value_of_c() -> Any:
    value = ctypes.c_double(0.0)
    return lambda: value.value, None


@refused
def generator_of_random_numbers() -> Any:
    generator = random.Random(0)
    return lambda: generator.getstate(), None


@refused
def getter_with_a_hidden_name() -> Any:
    getter, thing = operator.attrgetter("beta"), Config()
    return lambda: getter(thing), None


@refused
def file() -> Any:
    def read() -> str:
        with open(__file__) as stream:
            return stream.readline()

    return read, None


class Global:
    alpha: float


CONFIG = Global()


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    CONFIG.alpha = 0.0
    argv = list(sys.argv)
    yield
    sys.argv[:] = argv
    os.environ.pop("CLIPGRAD_TEST", None)
    sys.modules.pop("imported_by_the_loss", None)
    globals().pop("UNDO", lambda: None)()
    for name in ("LATER", "abs"):
        globals().pop(name, None)
    if hasattr(builtins, "LATER_BUILTIN"):
        del builtins.LATER_BUILTIN


@pytest.mark.parametrize("case", NOTICED)
def test_change_is_noticed(case: str) -> None:
    builtins.LATER_BUILTIN = abs  # type: ignore[attr-defined]
    read, change = NOTICED[case]()
    state = watched(read)
    change()
    assert state.change() is not None


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(case: str) -> None:
    read, _ = REFUSED[case]()
    with pytest.raises(CompileError, match=r"(go on with|opens a file).* or leave compile out"):
        watched(read)


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


def test_message_names_what_appeared() -> None:
    thing = Config()
    state = watched(lambda: thing.beta)
    thing.beta = 1.0
    assert state.change() == "thing.beta (absent -> 1.0)"


def test_equal_values_with_attributes_of_their_own_are_not_the_same() -> None:
    assert not same(Number(1.0), Number(1.0))
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
