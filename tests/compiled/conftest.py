"""Compiled steps without the wait: graphs are traced and lifted as ever, then run as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from clipgrad.compiled import backend


@dataclass
class Graphs:
    """The graphs that were handed to the backend.

    Attributes:
        modules: In the order of their making.
        alter: What to run instead of a graph.
    """

    modules: list[GraphModule] = field(default_factory=list)
    alter: Callable[[GraphModule], Callable[..., Any]] = lambda module: module

    def __len__(self) -> int:
        return len(self.modules)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Run graphs operation by operation instead of compiling them."""
    found = Graphs()

    def compile_graph(module: GraphModule, mode: str, arguments: Any) -> Callable[..., Any]:
        found.modules.append(module)
        return found.alter(module)

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    return found


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
