"""Write down every Python value that the functions seen during a trace could read."""

from __future__ import annotations

import builtins
import contextvars
import functools
import logging
import pathlib
import re
import sys
import threading
import types
import weakref
from collections import defaultdict, deque, namedtuple
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipgrad.compiled.elsewhere import Elsewhere
from clipgrad.compiled.observe import (
    Kind,
    Seen,
    by_any_name,
    globals_in,
    imported_by,
    kind_of_module,
)
from clipgrad.compiled.places import unseen
from clipgrad.compiled.state import MISSING, PLAIN, Current, State, contents
from clipgrad.errors import CompileError

# Functions without state of their own, values that never change, and things that say nothing about a result.
_HARMLESS = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType, types.CodeType,
    types.GenericAlias, types.UnionType, type(torch.ops.aten), type(torch.ops), type(torch.ops.aten.add),
    type(torch.ops.aten.add.Tensor), property, classmethod, staticmethod, functools.cached_property, re.Pattern,
    logging.Handler, type(threading.Lock()), type(threading.RLock()), pathlib.PurePath, Fraction,
    type(vars(namedtuple("_Named", "field"))["field"]),
)  # fmt: skip
_BUILTIN = (dict, list, tuple, set, frozenset, deque, types.MappingProxyType)
_SMALL_ARRAY = 64


def write_down(seen: Seen, roots: Mapping[str, Any]) -> State:
    """The state as it is now.

    Args:
        seen: What ran.
        roots: What the step was called with, by the name that a message gives it.

    Raises:
        CompileError: If something could change without being noticed.
    """
    if seen.opened is not None:
        raise CompileError(
            f"the loss opens a file while it runs (in {seen.opened}). A compiled step would go on with what stood "
            "there at the first batch. Read it before, and pass what the loss needs of it, or leave compile out."
        )
    state = State()
    _Walk(state, seen).all(roots)
    return state


class _Walk(Elsewhere):
    """One walk through everything that the functions seen could reach."""

    def all(self, roots: Mapping[str, Any]) -> None:
        for name, root in roots.items():
            self.visit(root, name)
        self.globals()
        for function in self._seen.functions():
            self.function(function)
        for value, anything in list(self._seen.objects.values()):
            self.visit(value, type(value).__name__, anything)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
            self.mapping(getattr(nn.modules.module, name), f"torch.nn.modules.module.{name}")
        self.settings()

    def globals(self) -> None:
        """Global variables that code mentions, those that would hide a builtin, and modules that it imports."""
        spaces: dict[int, tuple[dict[str, Any], set[str], set[str], list[bool]]] = {}
        for code, variables in self._seen.codes.items():
            _, names, made_up, whole = spaces.setdefault(
                id(variables), (variables, set(), set(), [])
            )
            names |= globals_in(code)
            made_up |= globals_in(code) if by_any_name(code) else set()
            whole.append("globals" in code.co_names)
            for module in imported_by(code, variables):
                self.visit(module, module.__name__)
        everywhere: set[str] = set()
        for variables, names, made_up, whole in spaces.values():
            if any(whole):
                made_up = names = names | {n for n in variables if not n.startswith("__")}
            for name in sorted(names & variables.keys()):
                self.item(variables, name, f"the global variable {name}", name in made_up)
            self.absent(variables, names, "the global variable ")
            everywhere |= names - variables.keys()
        for name in sorted(everywhere & vars(builtins).keys()):
            self.place(vars(builtins), name, f"the builtin {name}")
        self.absent(vars(builtins), everywhere, "the builtin ")

    def visit(self, value: Any, path: str, anything: bool = False) -> None:
        if isinstance(value, (*PLAIN, Tensor, *_HARMLESS)):
            plain = isinstance(value, PLAIN) and getattr(value, "__dict__", None) is not None
            if not plain or id(value) in self._visited:  # a subclass may hold attributes as well
                return
            self._visited[id(value)] = value, anything
            self.object(value, path, anything)
            return
        if type(value) is object:  # a mark, which holds nothing
            return
        if type(value) in weakref.ProxyTypes:
            raise unseen(path, value, "Hold the object itself")
        if id(value) not in self._visited or anything:
            self.once(value, path, anything)

    def once(self, value: Any, path: str, anything: bool) -> None:
        """A value that was not visited yet."""
        if self._visited.get(id(value), (None, False))[1]:
            return
        # With the value: an id is an identity only while its object lives.
        self._visited[id(value)] = value, anything
        if isinstance(value, nn.Module):
            self.module(value, path, anything)
        elif isinstance(value, types.MethodType):
            self.visit(value.__self__, path)
            self.visit(value.__func__, path)
        elif isinstance(value, functools.partial):
            self.visit(value.func, path)
            self.visit(value.args, path)
            self.mapping(value.keywords, path)
            self.mentioned(vars(value), path)
        elif isinstance(value, type):
            self.inherited(value, path, anything)
        elif isinstance(value, types.ModuleType):
            self.namespace(value, path)
        elif not self.elsewhere(value, path) and not self.container(value, path):
            self.object(value, path, anything)

    def namespace(self, module: types.ModuleType, path: str) -> None:
        """A module's variables; of libraries, whether what users name there is still the same."""
        inside = vars(module)
        kind = kind_of_module(module.__name__)
        if kind is Kind.USER:
            self.named(inside, path)
            self.absent(inside, self._seen.own, f"{path}.")
            return
        for name in sorted(self._seen.own & inside.keys()):
            value = self.place(inside, name, f"{path}.{name}")
            # PyTorch's tables are its own affair; sys.argv and the like are not.
            mutable = kind is Kind.LIBRARY and type(value) in (list, dict, set)
            mutable = mutable and value is not sys.modules
            if mutable or isinstance(value, types.ModuleType):
                self.visit(value, f"{path}.{name}")

    def container(self, value: Any, path: str) -> bool:
        if isinstance(value, dict | types.MappingProxyType):
            self.mapping(value, path)
            if isinstance(value, defaultdict):
                self.attribute(value, "default_factory", path)
        elif isinstance(value, list | tuple | deque):
            self.sequence(value, path)
        elif isinstance(value, set | frozenset):
            self.members(value, path)
        elif isinstance(value, contextvars.ContextVar):
            self.attribute(Current(value), "value", path)
        elif isinstance(value, np.ndarray):
            if value.size > _SMALL_ARRAY or value.dtype.kind not in "biufc":
                raise unseen(path, value, "Make it a tensor")
            self._state.arrays.append((value, value.copy(), path))
        else:
            return False
        if type(value) not in _BUILTIN and getattr(value, "__dict__", None) is not None:
            self.object(value, path, anything=False)  # a subclass may hold attributes as well
        elif type(value) not in _BUILTIN:
            self.inherited(type(value), path)
        return True

    def function(self, function: types.FunctionType) -> None:
        path = f"{function.__qualname__}"
        self.visit(function, path)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            value = contents(cell)
            self._state.cells.append((cell, value, f"the variable {name} of {path}"))
            if value is not MISSING:
                self.visit(value, name)
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name) is not None:
                self.attribute(function, name, f"a default of {path}")
