"""Write down state that lies elsewhere than in an object's own attributes: caches, references, registries, settings."""

from __future__ import annotations

import functools
import gc
import logging
import os
import types
import weakref
from typing import Any

from clipgrad.compiled.objects import Objects
from clipgrad.compiled.observe import Kind, kind_of_code
from clipgrad.compiled.places import unseen
from clipgrad.compiled.state import Evicted, Referent

_LRU_CACHE = type(functools.lru_cache(len))
_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
_LEVELS = {"level", "disabled", "isEnabledFor", "getEffectiveLevel"}
# Set by compilers and thread pools for themselves, also while a graph is compiled.
_OF_COMPILERS = ("TORCH", "TRITON", "PYTORCH", "KMP_", "OMP_", "CUDA", "CUBLAS")


class Elsewhere(Objects):
    """What is reached by way of a function, a reference or a setting of the process."""

    def elsewhere(self, value: Any, path: str) -> bool:
        """Write down a value if it is one of these; returns whether it is."""
        if isinstance(value, types.FunctionType):
            self.reached(value, path)
        elif isinstance(value, _LRU_CACHE):
            self.cached(value, path)
        elif isinstance(value, weakref.ReferenceType):
            self.attribute(Referent(value), "value", path)
        elif isinstance(value, logging.Logger):
            self.logger(value, path)
        elif isinstance(value, type(os.environ)):
            self.environment()
        else:
            return False
        return True

    def reached(self, function: types.FunctionType, path: str) -> None:
        """A function that some code may call or ask for attributes. Those that ran are visited by their code, too."""
        inside = vars(function)
        if kind_of_code(function.__code__, function.__globals__) is Kind.USER:
            self._state.attributes.append(
                (function, "__code__", function.__code__, f"the code of {path}")
            )
            self.mentioned(inside, path)
        elif "_clear_cache" in inside and "registry" in inside:  # functools.singledispatch
            self.mapping(inside["registry"], f"the functions registered with {path}")
            self.named(inside, path)

    def cached(self, function: Any, path: str) -> None:
        """What a cache holds. As long as an entry stays, the function behind it is not asked again."""
        found = [behind for behind in gc.get_referents(function) if type(behind) is dict]
        entries = [table for table in found if table is not vars(function)]
        if len(entries) != 1:
            raise unseen(path, function, f"Call {path}.__wrapped__ instead")
        size = function.cache_parameters()["maxsize"]
        for key in list(entries[0]):
            inside = f"an entry of the cache of {path}"
            if size is None:
                self.item(entries[0], key, inside)
            else:
                self.place(entries[0], key, inside)
        if size:
            # A place in a full cache is used again for another key, and later again for this one.
            owner = Evicted(function)
            evicted = f"the entries that the cache of {path} gave up"
            self._state.attributes.append((owner, "value", owner.value, evicted))
        self.mentioned(vars(function), path)
        self.visit(function.__wrapped__, path)

    def logger(self, logger: logging.Logger, path: str) -> None:
        """Levels, if some code asks for them: its own, and those that it takes over."""
        if _LEVELS.isdisjoint(self._seen.own):
            return
        self.place(vars(logger.manager), "_disable", "the level of logging.disable")
        above: logging.Logger | None = logger
        while above is not None:
            for name in ("level", "disabled", "parent"):
                self.place(vars(above), name, f"{path}.{name}")
            above = above.parent

    def environment(self) -> None:
        """Environment variables, but those that nobody names and compilers set."""
        table = vars(os.environ)["_data"]
        named = {os.fsencode(name) for name in self._seen.own}
        for key in sorted(named | set(table)):
            told = os.fsdecode(key)
            if key in named or not told.startswith(_OF_COMPILERS):
                self.place(table, key, f"the environment variable {told}")

    def settings(self) -> None:
        """What code can ask the process for without holding on to anything."""
        if not _ENVIRONMENT.isdisjoint(self._seen.own):
            self.environment()
