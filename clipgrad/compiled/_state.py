"""Python values that a traced step may have read, and whether they are still the same.

A graph bakes in every number, flag and branch that the loss took from Python. After a trace, everything that the
functions seen could read is written down place by place: attributes they name, global variables, closure cells,
defaults, the contents of lists and dictionaries. Comparing the places is one dictionary look-up each. What changes
without leaving a trace in such a place (an iterator, a large array, an object of an unknown extension) is refused.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import logging
import re
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipgrad.compiled._observe import Kind, Seen, kind_of_path
from clipgrad.errors import CompileError

_MISSING = object()
_get = dict.get  # subclasses may have another idea of what it does
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, np.generic,
)  # fmt: skip
# Functions without state of their own, and things that say nothing about a result.
_HARMLESS = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType, types.CodeType,
    types.GenericAlias, types.UnionType, type(torch.ops.aten), type(torch.ops), type(torch.ops.aten.add),
    type(torch.ops.aten.add.Tensor), property, classmethod, staticmethod, functools.cached_property, re.Pattern,
    logging.Logger, logging.Handler, type(functools.lru_cache(len)), weakref.ReferenceType, type(threading.Lock()),
    type(threading.RLock()),
)  # fmt: skip
_MANY = 50_000
_SMALL_ARRAY = 64
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
# Lists that recurrent layers keep of their own parameters, which are written down already.
_FLAT = ("_flat_weights", "_flat_weight_refs")
_MODULE = ("_parameters", "_buffers", "_modules", *_HOOKS)


def same(now: Any, was: Any) -> bool:
    """Whether a value is what it was: plain values by value, containers by contents, everything else by identity."""
    if now is was:
        return True
    if type(now) is not type(was):
        return False
    if isinstance(was, _PLAIN):
        return bool(now == was) or bool(now != now and was != was)
    if isinstance(was, tuple | list):
        return len(now) == len(was) and all(map(same, now, was))
    if type(was) is dict:
        return now.keys() == was.keys() and all(same(now[key], was[key]) for key in was)
    return False


class State:
    """The places that a step read, each with what was found in it."""

    def __init__(self, seen: Seen, roots: Mapping[str, Any]) -> None:
        """Write down what is there now.

        Args:
            seen: What ran.
            roots: What the step was called with, by the name that a message gives it.

        Raises:
            CompileError: If something could change without being noticed.
        """
        self._items: list[tuple[dict[Any, Any], Any, Any, str]] = []
        self._lengths: list[tuple[Any, int, str]] = []
        self._attributes: list[tuple[Any, str, Any, str]] = []
        self._cells: list[tuple[types.CellType, Any, str]] = []
        self._arrays: list[tuple[Any, Any, str]] = []
        _Walk(self, seen).all(roots)

    def __len__(self) -> int:
        return len(self._items) + len(self._lengths) + len(self._attributes) + len(self._cells)

    def forget_results(self, read: Sequence[Tensor]) -> None:
        """Leave out attributes in which each run puts a tensor of its own, unless another run reads it.

        Args:
            read: The tensors that a run found outside of its arguments, when the state was written down already.
        """
        known = {id(tensor) for tensor in read}
        self._items = [
            item
            for item in self._items
            if not (
                isinstance(item[2], Tensor)
                and id(item[2]) not in known
                and isinstance(now := _get(item[0], item[1], None), Tensor)
                and now is not item[2]
            )
        ]

    def change(self) -> str | None:
        """The first place whose value is another now, and how it changed; None if there is none."""
        for mapping, key, was, path in self._items:
            now = _get(mapping, key, _MISSING)
            if now is not was and not same(now, was):
                return f"{path} ({_told(was)} -> {_told(now)})"
        for container, length, path in self._lengths:
            if len(container) != length:
                return f"{path} ({length} -> {len(container)} entries)"
        for owner, name, was, path in self._attributes:
            now = getattr(owner, name, _MISSING)
            if not same(now, was):
                return f"{path} ({_told(was)} -> {_told(now)})"
        for cell, was, path in self._cells:
            now = _contents(cell)
            if not same(now, was):
                return f"{path} ({_told(was)} -> {_told(now)})"
        for array, copy, path in self._arrays:
            if not np.array_equal(array, copy, equal_nan=array.dtype.kind == "f"):
                return f"the values of {path}"
        return None


class _Walk:
    """One walk through everything that the functions seen could reach."""

    def __init__(self, state: State, seen: Seen) -> None:
        self._state = state
        self._seen = seen
        self._visited: dict[int, Any] = {}

    def all(self, roots: Mapping[str, Any]) -> None:
        for name, root in roots.items():
            self.visit(root, name)
        for code, variables in self._seen.codes.items():
            for name in code.co_names:
                if name in variables:
                    self.item(variables, name, f"the global variable {name}")
        for function in self._seen.functions():
            self.function(function)
        for value, anything in list(self._seen.objects.values()):
            self.visit(value, type(value).__name__, anything)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
            self.mapping(getattr(nn.modules.module, name), f"torch.nn.modules.module.{name}")

    def item(self, mapping: Mapping[Any, Any], key: Any, path: str) -> None:
        if not isinstance(mapping, dict):  # a read-only view of one, such as a class has
            value = mapping.get(key, _MISSING)
            self._state._attributes.append((_Entry(mapping, key), "value", value, path))
        else:
            value = _get(mapping, key, _MISSING)
            self._state._items.append((mapping, key, value, path))
        if len(self._state._items) > _MANY:
            raise CompileError(
                f"the loss reaches more than {_MANY} Python values, the last of them {path}: too many to compare at "
                "each step. Keep large tables in tensors, and the data set out of the loss's reach."
            )
        if value is not _MISSING:
            self.visit(value, path)

    def visit(self, value: Any, path: str, anything: bool = False) -> None:
        """Write down what can change inside of a value."""
        if isinstance(value, (*_PLAIN, Tensor, *_HARMLESS)):
            return
        if id(value) in self._visited and not anything:
            return
        self._visited[id(value)] = value  # an id is an identity only while its object lives
        if isinstance(value, nn.Module):
            self.module(value, path)
        elif isinstance(value, types.FunctionType):
            pass  # those that ran are visited by their code
        elif isinstance(value, types.MethodType):
            self.visit(value.__self__, path)
        elif isinstance(value, functools.partial):
            self.visit(value.func, path)
            self.visit(value.args, path)
            self.mapping(value.keywords, path)
        elif isinstance(value, type):
            self.inherited(value, {}, path)
        elif isinstance(value, types.ModuleType):
            if kind_of_path(getattr(value, "__file__", None) or "<frozen>") is Kind.USER:
                self.named(vars(value), path)
        elif not self.container(value, path):
            self.object(value, path, anything)

    def container(self, value: Any, path: str) -> bool:
        if isinstance(value, dict | types.MappingProxyType):
            self.mapping(value, path)
        elif isinstance(value, list | tuple | deque):
            self.sequence(value, path)
        elif isinstance(value, set | frozenset):
            self._state._attributes.append((_AsTuple(value), "entries", _entries(value), path))
            self.sequence(_entries(value), path)
        elif isinstance(value, contextvars.ContextVar):
            self._attribute(_Current(value), "value", path)
        elif isinstance(value, np.ndarray):
            if value.size > _SMALL_ARRAY or value.dtype.kind not in "biufc":
                raise _unseen(path, value, "Make it a tensor")
            self._state._arrays.append((value, value.copy(), path))
        else:
            return False
        if getattr(value, "__dict__", None):  # a subclass may hold attributes as well
            self.object(value, path, anything=False)
        return True

    def mapping(self, value: Mapping[Any, Any], path: str) -> None:
        self._state._lengths.append((value, len(value), path))
        for key in list(value):
            self.item(value, key, f"{path}[{key!r}]")

    def sequence(self, value: Sequence[Any], path: str) -> None:
        if not isinstance(value, tuple):
            self._state._lengths.append((value, len(value), path))
            self._state._attributes.append((_AsTuple(value), "entries", tuple(value), path))
        if len(value) > _MANY:
            raise CompileError(
                f"the loss reaches {path}, a list of {len(value)} values: too many to compare at each step. Keep them "
                "in a tensor, or out of the loss's reach."
            )
        for index, element in enumerate(value):
            self.visit(element, f"{path}[{index}]")

    def module(self, module: nn.Module, path: str) -> None:
        variables = vars(module)
        self.item(variables, "training", f"{path}.training")
        for name in _MODULE:
            table = variables.get(name)
            if table is None:
                continue
            self._state._lengths.append((table, len(table), f"{path}.{name}"))
            for key in list(table):
                inside = f"{path}.{key}" if name not in _HOOKS else f"{path}.{name}"
                self.item(table, key, inside)
        self.object(module, path, anything=False, skip=(*_MODULE, *_FLAT))

    def object(self, value: Any, path: str, anything: bool, skip: Iterable[str] = ()) -> None:
        """Attributes of an instance that some code names, or all of them."""
        kind = type(value)
        ours = kind.__module__.partition(".")[0] == "clipgrad"
        variables = getattr(value, "__dict__", None)
        slots = [
            name
            for base in kind.__mro__
            for name in _slots(base)
            if name in self._seen.names and not (ours and name.startswith("_"))
        ]
        if variables is None and not slots:
            if _stateless(kind):
                return
            raise _unseen(
                path, value, "Take what the loss needs of it into a tensor, a number or a list"
            )
        self._state._attributes.append((value, "__class__", kind, f"the class of {path}"))
        for name in slots:
            self._attribute(value, name, f"{path}.{name}")
        if variables is None:
            return
        wanted = variables.keys() if anything else self._seen.names & variables.keys()
        for name in sorted(set(wanted) - set(skip)):
            if not (ours and name.startswith("_")):
                self.item(variables, name, f"{path}.{name}")
        self.inherited(kind, variables, path)

    def inherited(self, kind: type, variables: Mapping[str, Any], path: str) -> None:
        """Class attributes that some code names: replaced methods, constants, and instances hiding them."""
        for base in kind.__mro__:
            if not _is_user_class(base):
                continue
            for name in self._seen.names & vars(base).keys():
                if name in variables or name.startswith("__"):
                    continue
                self.item(vars(base), name, f"{path}.{name}")
                if variables:
                    self.item(
                        variables, name, f"{path}.{name}"
                    )  # missing now; a later one would win

    def named(self, variables: Mapping[str, Any], path: str) -> None:
        for name in sorted(self._seen.names & variables.keys()):
            self.item(variables, name, f"{path}.{name}")

    def function(self, function: types.FunctionType) -> None:
        path = f"{function.__qualname__}"
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            value = _contents(cell)
            self._state._cells.append((cell, value, f"the variable {name} of {path}"))
            if value is not _MISSING:
                self.visit(value, name)
        for name in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            if value is not None:
                self._attribute(function, name, f"a default of {path}")

    def _attribute(self, owner: Any, name: str, path: str) -> None:
        value = getattr(owner, name, _MISSING)
        self._state._attributes.append((owner, name, value, path))
        if value is not _MISSING:
            self.visit(value, path)


class _AsTuple:
    """The entries of a list or set, readable as an attribute."""

    def __init__(self, value: Iterable[Any]) -> None:
        self._value = value

    @property
    def entries(self) -> tuple[Any, ...]:
        return _entries(self._value)


class _Entry:
    """An entry of a mapping, readable as an attribute."""

    def __init__(self, mapping: Mapping[Any, Any], key: Any) -> None:
        self._mapping, self._key = mapping, key

    @property
    def value(self) -> Any:
        return self._mapping.get(self._key, _MISSING)


class _Current:
    """The value of a context variable, readable as an attribute."""

    def __init__(self, variable: contextvars.ContextVar[Any]) -> None:
        self._variable = variable

    @property
    def value(self) -> Any:
        return self._variable.get(None)


def _entries(value: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(value)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def _is_user_class(kind: type) -> bool:
    module = __import__("sys").modules.get(kind.__module__)
    path = getattr(module, "__file__", None)
    return path is not None and kind_of_path(path) is Kind.USER


def _stateless(kind: type) -> bool:
    """Whether an instance without attributes has no other state: its class is written in Python, or PyTorch's."""
    python = any("__slots__" in vars(base) for base in kind.__mro__)
    return python or kind.__module__.partition(".")[0] == "torch"


def _unseen(path: str, value: Any, remedy: str) -> CompileError:
    return CompileError(
        f"the loss can read {path}, a {type(value).__name__}, which may change without being noticed, and a compiled "
        f"step would go on with the old value. {remedy}, keep it out of the loss's reach, or leave compile out."
    )


def _told(value: Any) -> str:
    if value is _MISSING:
        return "absent"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (*_PLAIN, tuple)):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"{type(value).__name__} at {id(value):#x}"
