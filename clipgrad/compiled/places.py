"""Write down places one by one: entries of dictionaries and lists, attributes, and names that are not there."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clipgrad.compiled.observe import Seen
from clipgrad.compiled.state import MISSING, AsTuple, Entry, State, get
from clipgrad.errors import CompileError

_MANY = 50_000


class Places:
    """What a walk has written down so far.

    Args:
        state: To write to.
        seen: What ran.
    """

    def __init__(self, state: State, seen: Seen) -> None:
        self._state = state
        self._seen = seen
        self._visited: dict[int, tuple[Any, bool]] = {}
        self._classes: dict[int, type] = {}
        self._sets: dict[frozenset[str], frozenset[str]] = {}

    def visit(self, value: Any, path: str, anything: bool = False) -> None:
        """Write down what can change inside of a value.

        Args:
            value: The value.
            path: Its name in messages.
            anything: Whether some code may have read any of its attributes, by whatever name.
        """
        raise NotImplementedError

    def item(self, mapping: Mapping[Any, Any], key: Any, path: str, anything: bool = False) -> None:
        """An entry of a mapping, and what is inside of it."""
        value = self.place(mapping, key, path)
        if value is not MISSING:
            self.visit(value, path, anything)

    def place(self, mapping: Mapping[Any, Any], key: Any, path: str) -> Any:
        """An entry of a mapping, whatever is inside of it; returns its value."""
        mapping = dictionary(mapping)
        if isinstance(mapping, dict):
            value = get(mapping, key, MISSING)
            self._state.items.append((mapping, key, value, path))
        else:
            value = mapping.get(key, MISSING)
            self._state.attributes.append((Entry(mapping, key), "value", value, path))
        if len(self._state.items) > _MANY:
            raise CompileError(
                f"the loss reaches more than {_MANY} Python values, the last of them {path}: too many to compare at "
                "each step. Keep large tables in tensors, and the data set out of the loss's reach."
            )
        return value

    def absent(self, variables: Mapping[str, Any], names: Iterable[str], path: str) -> None:
        """Names that are not among some variables now: one that appears later would be found."""
        lacking = frozenset(names).difference(variables)
        lacking = self._sets.setdefault(lacking, lacking)  # most objects of a class lack the same
        self._state.absent.append((dictionary(variables), lacking, path))  # type: ignore[arg-type]

    def attribute(self, owner: Any, name: str, path: str) -> None:
        """What is read by name but does not lie in a dictionary."""
        value = getattr(owner, name, MISSING)
        self._state.attributes.append((owner, name, value, path))
        if value is not MISSING:
            self.visit(value, path)

    def named(self, variables: Mapping[str, Any], path: str) -> None:
        """Those variables that some code mentions."""
        for name in sorted(self._seen.names & variables.keys()):
            self.item(variables, name, f"{path}.{name}")

    def mentioned(self, variables: Mapping[str, Any], path: str) -> None:
        """Variables that some code mentions, and those that it mentions and are not there."""
        self.named(variables, path)
        self.absent(variables, self._seen.names, f"{path}.")

    def mapping(self, value: Mapping[Any, Any], path: str) -> None:
        """All entries of a mapping, their number and order."""
        self.keys(value, path)
        for key in list(value):
            self.item(value, key, f"{path}[{key!r}]")

    def keys(self, value: Mapping[Any, Any], path: str) -> None:
        """How many entries a mapping has, and in which order."""
        self._state.lengths.append((value, len(value), path))
        if len(value) > 1:
            order = f"the order of {path}"
            self._state.attributes.append((AsTuple(value), "entries", tuple(value), order))

    def sequence(self, value: Sequence[Any], path: str) -> None:
        """All entries of a list or tuple."""
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

    def members(self, value: set[Any] | frozenset[Any], path: str) -> None:
        """All members of a set."""
        self._state.attributes.append((AsTuple(value), "entries", tuple(value), path))
        self.sequence(tuple(value), path)


def dictionary(mapping: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """What a read-only view, such as a class has of its attributes, is a view of: to be read without the detour."""
    if isinstance(mapping, types.MappingProxyType):
        behind = gc.get_referents(mapping)
        if len(behind) == 1 and type(behind[0]) is dict:
            return behind[0]
    return mapping


def unseen(path: str, value: Any, remedy: str) -> CompileError:
    """The error for a value that may change without being noticed."""
    return CompileError(
        f"the loss can read {path}, a {type(value).__name__}, which may change without being noticed, and a compiled "
        f"step would go on with the old value. {remedy}, keep it out of the loss's reach, or leave compile out."
    )
