"""See every Python function that runs while a step is traced: what it can read is what a graph may have baked in."""

from __future__ import annotations

import dis
import gc
import os
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


class Kind(Enum):
    """Whose code a function is."""

    USER = "user"
    """The loss, the model, and libraries that are not known: all that it can read counts."""
    TORCH = "torch"
    """PyTorch: modules keep their configuration in attributes; the rest depends on arguments alone."""
    LIBRARY = "library"
    """The standard library, NumPy and clipgrad: depends on arguments alone."""


def _folder(path: str) -> str:
    return os.path.join(os.path.realpath(path), "")


_HERE = _folder(os.path.dirname(os.path.dirname(__file__)))
_TORCH = _folder(os.path.dirname(torch.__file__))
_NUMPY = _folder(os.path.dirname(np.__file__))
_STANDARD = _folder(sysconfig.get_paths()["stdlib"])
_SITES = tuple(
    _folder(os.path.join(_STANDARD, name)) for name in ("site-packages", "dist-packages")
)
_observed: set[CodeType] = set()


def observed(function: F) -> F:
    """Mark a function of clipgrad that reads state which users may change."""
    _observed.add(function.__code__)
    return function


def kind_of_path(path: str) -> Kind:
    """Whose a source file is."""
    if path.startswith("<frozen"):
        return Kind.LIBRARY
    path = os.path.realpath(path)
    if path.startswith(_TORCH):
        return Kind.TORCH
    standard = path.startswith(_STANDARD) and not path.startswith(_SITES)
    return Kind.LIBRARY if standard or path.startswith((_HERE, _NUMPY)) else Kind.USER


def kind_of_module(name: str) -> Kind:
    """Whose a module is. One that came from no file was typed in (a notebook) or made by hand."""
    module = sys.modules.get(name)
    path = getattr(module, "__file__", None)
    if path is not None:
        return kind_of_path(path)
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    inside = name in sys.builtin_module_names or origin in ("built-in", "frozen")
    return Kind.LIBRARY if inside else Kind.USER


def kind_of_code(code: CodeType, variables: Mapping[str, Any]) -> Kind:
    """Whose code is that sees these global variables."""
    if code in _observed:
        return Kind.USER
    if code.co_filename.startswith("<") and not code.co_filename.startswith("<frozen"):
        # Generated, such as a dataclass's __init__.
        return kind_of_module(str(variables.get("__name__")))
    return kind_of_path(code.co_filename)


# Ways to read an attribute whose name does not stand in the code.
_BY_ANY_NAME = {
    "getattr", "vars", "__dict__", "eval", "exec", "globals", "attrgetter", "hasattr", "__globals__",
}  # fmt: skip
_OF_MODULES = {"modules", "import_module", "__import__"}
_IMPORT = dis.opmap["IMPORT_NAME"]


@dataclass
class Seen:
    """What ran.

    Attributes:
        codes: Code of users, with the global variables of its module.
        names: Every name of a global or an attribute that any of the code mentions.
        own: Those that code of users mentions.
        opened: The function of a user that opened a file.
        objects: What functions received that has attributes, by id; ``True`` if any of them may have been read.
    """

    codes: dict[CodeType, dict[str, Any]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    opened: str | None = None
    objects: dict[int, tuple[Any, bool]] = field(default_factory=dict)

    def forget_temporaries(self) -> None:
        """Drop what nobody else holds: made by the step itself, it says nothing about the next one."""
        alive = {key: weakref.ref(v) for key, (v, _) in self.objects.items() if _can_be_weak(v)}
        flags = {key: flag for key, (_, flag) in self.objects.items()}
        strong = [value for key, (value, _) in self.objects.items() if key not in alive]
        self.objects.clear()
        gc.collect(1)  # temporaries in cycles would else keep activations alive
        kept = [value for reference in alive.values() if (value := reference()) is not None]
        before = -1
        while before != len(strong):  # letting go of one may leave another unheld
            before = len(strong)
            for index in reversed(range(len(strong))):
                if sys.getrefcount(strong[index]) <= 2:
                    del strong[index]
        self.objects = {id(value): (value, flags[id(value)]) for value in (*kept, *strong)}

    def functions(self) -> list[FunctionType]:
        """The function objects that exist for the code: with closures and defaults."""
        wanted = set(self.codes)
        found = gc.get_referrers(*wanted) if wanted else []
        return [f for f in found if isinstance(f, FunctionType) and f.__code__ in wanted]


class Observer:
    """Context manager that fills in a ``Seen``; whatever profiler was active is put back afterwards."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._kinds: dict[CodeType, Kind] = {}
        self._before: Any = None
        self._inside: FrameType | None = None
        self._collects = True

    def __enter__(self) -> Seen:
        # What is made from here on stays young, so that temporaries are found without a walk through everything.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self.seen

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)
        self._inside = None
        if self._collects:
            gc.enable()

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._inside is not None:  # the tracer's own work, and whatever it runs for that
            if event == "return" and frame is self._inside:
                self._inside = None
            return
        if event != "call":
            if argument is open and self._kinds.get(frame.f_code) is Kind.USER:
                self.seen.opened = frame.f_code.co_qualname
            return
        code = frame.f_code
        kind = self._kinds.get(code)
        if kind is None:
            kind = self._kinds[code] = kind_of_code(code, frame.f_globals)
            if kind is not Kind.LIBRARY:
                self.seen.names.update(names_in(code))
            if kind is Kind.USER:
                self.seen.own.update(names_in(code))
                self.seen.codes[code] = frame.f_globals
        if kind is Kind.LIBRARY:
            return
        if kind is Kind.TORCH:
            if code.co_name == "__torch_dispatch__":
                self._inside = frame
            if code.co_varnames[:1] != ("self",):
                return
        anything = kind is Kind.USER and by_any_name(code)
        for name, value in frame.f_locals.items():
            if kind is Kind.TORCH and not (name == "self" and isinstance(value, nn.Module)):
                continue
            self._receive(value, anything)

    def _receive(self, value: Any, anything: bool) -> None:
        if isinstance(value, torch.Tensor) or type(value) in (str, int, float, bool, type(None)):
            return
        _, before = self.seen.objects.get(id(value), (None, False))
        self.seen.objects[id(value)] = (value, anything or before)  # alive until the trace is over


def _can_be_weak(value: Any) -> bool:
    try:
        weakref.ref(value)
    except TypeError:
        return False
    return True


def by_any_name(code: CodeType) -> bool:
    """Whether the code may read attributes by names that do not stand in it."""
    return not _BY_ANY_NAME.isdisjoint(code.co_names)


def names_in(code: CodeType) -> set[str]:
    """Names that the code, or code nested in it, may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)  # getattr(self, "name"), self.__dict__["name"]
    return names


def globals_in(code: CodeType) -> set[str]:
    """Names that the code may look up among its global variables."""
    return names_in(code) if by_any_name(code) else set(code.co_names)


def imported_by(code: CodeType, variables: Mapping[str, Any]) -> Iterator[ModuleType]:
    """Modules that the code imports while it runs: they need not be among the global variables."""
    names: set[str] = set()
    if not _OF_MODULES.isdisjoint(code.co_names):
        names |= {text for text in code.co_consts if isinstance(text, str)}
    if _IMPORT in code.co_code[::2]:
        names |= {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
    parents = str(variables.get("__package__") or "").split(".")
    prefixes = ["", *(".".join(parents[: n + 1]) + "." for n in range(len(parents)) if parents[0])]
    for name in sorted(names):
        for prefix in prefixes:  # a relative import does not say how far up it starts
            module = sys.modules.get((prefix + name).rstrip("."))
            if isinstance(module, ModuleType):
                yield module
