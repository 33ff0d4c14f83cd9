"""Write down what objects, classes and modules hold under the names that some code mentions."""

from __future__ import annotations

import importlib.machinery
import io
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from clipgrad.compiled.observe import Kind, kind_of_module
from clipgrad.compiled.places import Places, unseen

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Lists that recurrent layers keep of their own parameters, which are written down already.
_FLAT = ("_flat_weights", "_flat_weight_refs")
_MODULE = ("_parameters", "_buffers", "_modules", *_HOOKS)
_EVERY_MODULE = frozenset(vars(nn.Module()))
# Methods that Python calls without anybody's code naming them.
_SPECIAL = frozenset(
    name
    for kind in (object, int, float, complex, str, list, dict, set, type(iter([])))
    for name in vars(kind)
    if name.startswith("__") and callable(getattr(kind, name))
) | {"__call__", "__getattr__", "__get__", "__set__", "__enter__", "__exit__", "__missing__"}
# Of ``nn.Module``, by TorchDynamo when it compiles for the first time.
_REPLACED = {"__init__", "__setstate__"}
_SILENT = {"__doc__", "__dict__", "__weakref__", "__module__", "__annotations__", "__class__"}
# Written in C, but what they hold is written down, or says nothing about a result.
_OPEN = (
    object, type, dict, list, tuple, set, frozenset, deque, OrderedDict, defaultdict, np.ndarray, bool, int, float,
    complex, str, bytes, types.SimpleNamespace, types.ModuleType, threading.local,
)  # fmt: skip
# Base classes of the standard library whose methods read no attributes of their own.
_WITHOUT_ATTRIBUTES = {"abc", "typing", "collections.abc", "enum", "types", "argparse", "builtins"}
_HEAP = 1 << 9


class Objects(Places):
    """Attributes of objects and of their classes."""

    def module(self, module: nn.Module, path: str, anything: bool) -> None:
        """A module: its mode, tensors, children and hooks, and whatever else some code names."""
        variables = vars(module)
        self.item(variables, "training", f"{path}.training")
        for name in _MODULE:
            table = variables.get(name)
            if table is None:
                continue
            self.keys(table, f"{path}.{name}")
            for key in list(table):
                inside = f"{path}.{key}" if name not in _HOOKS else f"{path}.{name}"
                self.item(table, key, inside)
        self.object(module, path, anything, skip=(*_MODULE, *_FLAT))

    def object(self, value: Any, path: str, anything: bool, skip: Iterable[str] = ()) -> None:
        """Attributes of an instance that some code names, or all of them; those that it lacks; its class."""
        kind = type(value)
        if any(map(_is_opaque, kind.__mro__)):
            raise unseen(path, value, "Take what the loss needs of it into a tensor or a number")
        ours = kind.__module__.partition(".")[0] == "clipgrad"
        names = {n for n in self._seen.names if not n.startswith("_")} if ours else self._seen.names
        variables = getattr(value, "__dict__", None)
        if not isinstance(variables, dict):
            variables = None
        anything = (anything and not ours) or _read_by_library(kind)
        slots = [n for base in kind.__mro__ for n in _slots(base) if anything or n in names]
        if variables is None and not slots and not _stateless(kind):
            raise unseen(
                path, value, "Take what the loss needs of it into a tensor, a number or a list"
            )
        self._state.attributes.append((value, "__class__", kind, f"the class of {path}"))
        if variables is not None:  # another one may be put in its place
            self._state.attributes.append((value, "__dict__", variables, f"all of {path}"))
        for name in slots:
            self.attribute(value, name, f"{path}.{name}")
        if variables is not None:
            wanted = names & variables.keys()
            if anything:
                wanted |= variables.keys() - (_EVERY_MODULE if isinstance(value, nn.Module) else ())
            for name in sorted(wanted - set(skip)):
                self.item(variables, name, f"{path}.{name}", anything)
            self.absent(variables, names, f"{path}.")
        self.inherited(kind, path)

    def inherited(self, kind: type, path: str, anything: bool = False) -> None:
        """What a class and its bases hold under the names that some code mentions, and what they lack.

        Of PyTorch's own modules it is only compared whether it is still the same: nothing else lies there.
        """
        for base in kind.__mro__:
            user = _is_user_class(base)
            if id(base) in self._classes and not (user and anything):
                continue
            if not base.__flags__ & _HEAP or not (user or issubclass(base, nn.Module)):
                continue
            self._classes[id(base)] = base
            inside = vars(base)
            names = self._seen.names | _SPECIAL if user else self._seen.names - _REPLACED
            wanted = inside.keys() & names
            if anything and user:
                wanted |= {name for name in inside if not name.startswith("__")}
            for name in sorted(wanted - _SILENT):
                if user and not name.startswith("__"):
                    self.item(inside, name, f"{path}.{name}")
                else:
                    self.place(inside, name, f"{path}.{name}")
            self.absent(inside, names, f"{base.__name__}.")
        if type(kind) is not type:
            self.inherited(type(kind), f"the class of {kind.__name__}")


def _slots(kind: type) -> list[str]:
    """Names of a class's slots as code reads them, that is with the class's name before private ones."""
    if "__slots__" not in vars(kind):
        return []
    descriptor = types.MemberDescriptorType
    return [name for name, value in vars(kind).items() if isinstance(value, descriptor)]


def _is_user_class(kind: type) -> bool:
    return kind_of_module(kind.__module__) is Kind.USER


def _read_by_library(kind: type) -> bool:
    """Whether methods of the standard library, which nobody watches, may read attributes of the instance."""
    return any(
        kind_of_module(base.__module__) is Kind.LIBRARY
        and base.__module__ not in _WITHOUT_ATTRIBUTES
        and base.__module__.partition(".")[0] not in ("clipgrad", "numpy")
        and base not in _OPEN
        for base in kind.__mro__
    )


def _is_opaque(kind: type) -> bool:
    """Whether instances hold what no attribute shows: classes that are written in C and not known."""
    if kind in _OPEN or issubclass(kind, BaseException | io.IOBase):
        return False
    module = kind.__module__
    if module.partition(".")[0] in ("torch", "typing"):
        return False
    if not kind.__flags__ & _HEAP or module in sys.builtin_module_names:
        return True
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    return path.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


def _stateless(kind: type) -> bool:
    """Whether an instance without attributes has no other state: its class is written in Python, or PyTorch's."""
    python = any("__slots__" in vars(base) for base in kind.__mro__)
    return python or kind.__module__.partition(".")[0] == "torch"
