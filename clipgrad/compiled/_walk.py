"""Write down every Python value that the functions seen during a trace could read."""

from __future__ import annotations

import contextvars
import functools
import logging
import re
import sys
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
from clipgrad.compiled._state import MISSING, PLAIN, AsTuple, Current, Entry, State, contents, get
from clipgrad.errors import CompileError

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


def write_down(seen: Seen, roots: Mapping[str, Any]) -> State:
    """The state as it is now.

    Args:
        seen: What ran.
        roots: What the step was called with, by the name that a message gives it.

    Raises:
        CompileError: If something could change without being noticed.
    """
    state = State()
    _Walk(state, seen).all(roots)
    return state


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
            value = mapping.get(key, MISSING)
            self._state.attributes.append((Entry(mapping, key), "value", value, path))
        else:
            value = get(mapping, key, MISSING)
            self._state.items.append((mapping, key, value, path))
        if len(self._state.items) > _MANY:
            raise CompileError(
                f"the loss reaches more than {_MANY} Python values, the last of them {path}: too many to compare at "
                "each step. Keep large tables in tensors, and the data set out of the loss's reach."
            )
        if value is not MISSING:
            self.visit(value, path)

    def visit(self, value: Any, path: str, anything: bool = False) -> None:
        """Write down what can change inside of a value."""
        if isinstance(value, (*PLAIN, Tensor, *_HARMLESS)):
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
            self._state.attributes.append((AsTuple(value), "entries", tuple(value), path))
            self.sequence(tuple(value), path)
        elif isinstance(value, contextvars.ContextVar):
            self._attribute(Current(value), "value", path)
        elif isinstance(value, np.ndarray):
            if value.size > _SMALL_ARRAY or value.dtype.kind not in "biufc":
                raise _unseen(path, value, "Make it a tensor")
            self._state.arrays.append((value, value.copy(), path))
        else:
            return False
        if getattr(value, "__dict__", None):  # a subclass may hold attributes as well
            self.object(value, path, anything=False)
        return True

    def mapping(self, value: Mapping[Any, Any], path: str) -> None:
        self._state.lengths.append((value, len(value), path))
        for key in list(value):
            self.item(value, key, f"{path}[{key!r}]")

    def sequence(self, value: Sequence[Any], path: str) -> None:
        if not isinstance(value, tuple):
            self._state.lengths.append((value, len(value), path))
            self._state.attributes.append((AsTuple(value), "entries", tuple(value), path))
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
            self._state.lengths.append((table, len(table), f"{path}.{name}"))
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
        self._state.attributes.append((value, "__class__", kind, f"the class of {path}"))
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
            value = contents(cell)
            self._state.cells.append((cell, value, f"the variable {name} of {path}"))
            if value is not MISSING:
                self.visit(value, name)
        for name in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            if value is not None:
                self._attribute(function, name, f"a default of {path}")

    def _attribute(self, owner: Any, name: str, path: str) -> None:
        value = getattr(owner, name, MISSING)
        self._state.attributes.append((owner, name, value, path))
        if value is not MISSING:
            self.visit(value, path)


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def _is_user_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
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
