"""Caches, references, registries and containers: a change of each is noticed, or it is refused."""

from __future__ import annotations

import collections
import ctypes
import functools
import multiprocessing
import operator
import random
import weakref
from typing import Any, NamedTuple

import pytest

from clipgrad.errors import CompileError
from tests.compiled.watching import Cases, Config, Empty, assert_noticed, watched

cases = Cases()
noticed, refused = cases.noticed, cases.refused


# Not as constants of the code that reads them.
ALPHA, BETA = "alpha", "beta"


class Named(NamedTuple):
    beta: float


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


@pytest.mark.parametrize("case", cases.all_noticed)
def test_change_is_noticed(case: str) -> None:
    assert_noticed(cases.all_noticed[case])


@pytest.mark.parametrize("case", cases.all_refused)
def test_what_cannot_be_compared_is_refused(case: str) -> None:
    read, _ = cases.all_refused[case]()
    with pytest.raises(CompileError, match=r"(go on with|opens a file).* or leave compile out"):
        watched(read)
