"""Functions that read something, and changes of it, each to be noticed or refused; without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipgrad.compiled.observe import Observer
from clipgrad.compiled.state import State
from clipgrad.compiled.walk import write_down

Read = Callable[[], Any]
Case = Callable[[], tuple[Read, Callable[[], Any]]]


class Cases:
    """The cases of one file by name: each makes a function that reads, and one that changes what it reads."""

    def __init__(self) -> None:
        self.all_noticed: dict[str, Case] = {}
        self.all_refused: dict[str, Case] = {}

    def noticed(self, case: Case) -> Case:
        self.all_noticed[case.__name__] = case
        return case

    def refused(self, case: Case) -> Case:
        self.all_refused[case.__name__] = case
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


def assert_noticed(case: Case) -> None:
    read, change = case()
    state = watched(read)
    change()
    assert state.change() is not None


class Config:
    """Without attributes of its own: everything is a default of the class."""

    beta = 0.0

    def weight(self) -> float:
        return self.beta


class Empty:
    pass
