"""Python values that a traced step may have read, and whether they are still the same.

A graph bakes in every number, flag and branch that the loss took from Python. After a trace, everything that the
functions seen could read is written down place by place: attributes they name, global variables, closure cells,
defaults, the contents of lists and dictionaries, and the names that were looked for and not there. Comparing the places
is one dictionary look-up each. What changes without leaving a trace in such a place (an iterator, a large array, an
object of an unknown extension) is refused.
"""

from __future__ import annotations

import contextvars
import enum
import types
import weakref
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

MISSING = object()
get = dict.get  # subclasses may have another idea of what it does
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, np.generic,
)  # fmt: skip


def same(now: Any, was: Any) -> bool:
    """Whether a value is what it was: plain values by value, containers by contents, everything else by identity."""
    if now is was:
        return True
    if type(now) is not type(was) or hasattr(was, "__dict__"):
        return False  # even if equal: it may have attributes of its own
    if isinstance(was, PLAIN):
        return bool(now == was) or bool(now != now and was != was)
    if isinstance(was, tuple | list):
        return len(now) == len(was) and all(map(same, now, was))
    if type(was) is dict:
        return list(now) == list(was) and all(same(now[key], was[key]) for key in was)
    return False


class _Columns:
    """The places of a ``State`` column by column, so that one loop of the interpreter's own compares them all.

    By identity alone: what is not the same object may still be equal, and ``State.change`` decides that.
    """

    def __init__(self, state: State) -> None:
        # A list's or set's entries are read as a tuple made for the purpose, which is never the same object twice.
        entries = [place for place in state.attributes if isinstance(place[0], AsTuple)]
        attributes = [place for place in state.attributes if not isinstance(place[0], AsTuple)]
        self._mappings, self._keys, self._items = _columns(state.items, 3)
        self._containers, self._lengths = _columns(state.lengths, 2)
        self._owners, self._names, self._attributes = _columns(attributes, 3)
        self._lists = [owner.value for owner, *_ in entries]
        self._list_lengths = [len(was) for _, _, was, _ in entries]
        self._entries = [value for _, _, was, _ in entries for value in was]
        self._cells, self._contents = _columns(state.cells, 2)
        self._lacking, self._absent = _columns(state.absent, 2)

    def identical(self) -> bool:
        """Whether every place holds the very object that was found in it."""
        missing = repeat(MISSING)
        entries = list(chain.from_iterable(self._lists))
        try:
            contents_now = list(map(_CONTENTS, self._cells))
        except ValueError:  # one without a value
            return False
        return (
            all(map(is_, map(get, self._mappings, self._keys, missing), self._items))
            and list(map(len, self._containers)) == self._lengths
            and all(map(is_, map(getattr, self._owners, self._names, missing), self._attributes))
            and list(map(len, self._lists)) == self._list_lengths
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and all(map(is_, contents_now, self._contents))
            and all(map(frozenset.isdisjoint, self._absent, self._lacking))
        )


_CONTENTS = attrgetter("cell_contents")


def _columns(places: Sequence[tuple[Any, ...]], count: int) -> list[list[Any]]:
    return [[place[index] for place in places] for index in range(count)]


class State:
    """The places that a step read, each with what was found in it, and a name for messages; see ``_walk``.

    Attributes:
        items: Entries of dictionaries: global variables, attributes of instances.
        lengths: Containers and how many entries they had.
        attributes: What else is read by name: slots, class attributes, contents of lists.
        cells: Variables of closures.
        absent: Dictionaries that some code may have asked for names that they do not have.
        arrays: Small NumPy arrays with a copy.
    """

    def __init__(self) -> None:
        self.items: list[tuple[dict[Any, Any], Any, Any, str]] = []
        self.lengths: list[tuple[Any, int, str]] = []
        self.attributes: list[tuple[Any, str, Any, str]] = []
        self.cells: list[tuple[types.CellType, Any, str]] = []
        self.absent: list[tuple[dict[str, Any], frozenset[str], str]] = []
        self.arrays: list[tuple[Any, Any, str]] = []
        self._columns: _Columns | None = None
        """Made by the first ``change``; from then on places may only be left out, by ``forget_results``."""

    def __len__(self) -> int:
        named = len(self.items) + len(self.attributes) + len(self.cells)
        return named + len(self.lengths) + len(self.absent)

    def forget_results(self, read: Sequence[Tensor]) -> None:
        """Leave out attributes in which each run puts a tensor of its own, unless another run reads it.

        Args:
            read: The tensors that a run found outside of its arguments, when the state was written down already.
        """
        known = {id(tensor) for tensor in read}
        self.items = [
            item
            for item in self.items
            if not (
                isinstance(item[2], Tensor)
                and id(item[2]) not in known
                and isinstance(now := get(item[0], item[1], None), Tensor)
                and now is not item[2]
            )
        ]
        self._columns = None

    def change(self) -> str | None:
        """The first place whose value is another now, and how it changed; None if there is none."""
        if self._columns is None:
            self._columns = _Columns(self)
        if not self._columns.identical():
            return self._first_change()
        return self._array_change()

    def _first_change(self) -> str | None:
        for mapping, key, was, path in self.items:
            now = get(mapping, key, MISSING)
            if now is not was and not same(now, was):
                return f"{path} ({_told(was)} -> {_told(now)})"
        for container, length, path in self.lengths:
            if len(container) != length:
                return f"{path} ({length} -> {len(container)} entries)"
        for owner, name, was, path in self.attributes:
            now = getattr(owner, name, MISSING)
            if not same(now, was):
                return f"{path} ({_told(was)} -> {_told(now)})"
        for cell, was, path in self.cells:
            now = contents(cell)
            if not same(now, was):
                return f"{path} ({_told(was)} -> {_told(now)})"
        for variables, names, path in self.absent:
            for name in sorted(names & variables.keys()):
                return f"{path}{name} (absent -> {_told(variables[name])})"
        return self._array_change()

    def _array_change(self) -> str | None:
        for array, copy, path in self.arrays:
            if not np.array_equal(array, copy, equal_nan=array.dtype.kind == "f"):
                return f"the values of {path}"
        return None


class AsTuple:
    """The entries of a list or set, or the keys of a dictionary in their order, readable as an attribute."""

    def __init__(self, value: Collection[Any]) -> None:
        self.value = value

    @property
    def entries(self) -> tuple[Any, ...]:
        return tuple(self.value)


class Entry:
    """An entry of a mapping, readable as an attribute."""

    def __init__(self, mapping: Mapping[Any, Any], key: Any) -> None:
        self._mapping, self._key = mapping, key

    @property
    def value(self) -> Any:
        return self._mapping.get(self._key, MISSING)


class Referent:
    """What a weak reference refers to, readable as an attribute."""

    def __init__(self, reference: weakref.ref[Any]) -> None:
        self._reference = reference

    @property
    def value(self) -> Any:
        return self._reference()


class Evicted:
    """How many entries a bounded cache has given up to others, readable as an attribute."""

    def __init__(self, function: Any) -> None:
        self._function = function

    @property
    def value(self) -> int:
        info = self._function.cache_info()
        return int(info.misses - info.currsize)


class Current:
    """The value of a context variable, readable as an attribute."""

    def __init__(self, variable: contextvars.ContextVar[Any]) -> None:
        self._variable = variable

    @property
    def value(self) -> Any:
        return self._variable.get(None)


def contents(cell: types.CellType) -> Any:
    """The value of a closure's variable, which may not have one yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _told(value: Any) -> str:
    if value is MISSING:
        return "absent"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (*PLAIN, tuple)):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"{type(value).__name__} at {id(value):#x}"
