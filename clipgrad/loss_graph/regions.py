"""This module makes a graph leave its regions (``vmap``, autocast) in order, also after an error."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch import predispatch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, Node

from clipgrad.loss_graph.reasons import CannotCapture, line_in

# The position of the level among the arguments.
_LEVELS = {"_add_batch_dim": 2, "_remove_batch_dim": 1}
_HARMLESS = {"lazy_load_decompositions"}


class _Open(threading.local):
    """This class holds the functions that leave the open regions of this thread, outermost region first."""

    def __init__(self) -> None:
        self.closers: list[Callable[[], Any]] = []


_open = _Open()


def enter_vmap(*args: Any) -> int:
    """Open a level of ``vmap`` and return it."""
    level: int = predispatch._vmap_increment_nesting(*args)
    _open.closers.append(predispatch._vmap_decrement_nesting)
    return level


def enter_autocast(*args: Any) -> None:
    """Enter an autocast region of the loss."""
    context = _enter_autocast(*args)
    _open.closers.append(lambda: _exit_autocast(context))


def leave() -> None:
    """Leave the innermost region."""
    _open.closers.pop()()


_OPENS: dict[str, Callable[..., Any]] = {
    "_vmap_increment_nesting": enter_vmap,
    "_enter_autocast": enter_autocast,
}
_CLOSES = {"_vmap_decrement_nesting", "_exit_autocast"}


@contextlib.contextmanager
def close_regions() -> Iterator[None]:
    """Leave all regions that the body entered, and restore the grad mode, also after an error."""
    before = len(_open.closers)
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            while len(_open.closers) > before:
                leave()


def rewrite_regions(graph: Graph) -> None:
    """Replace the graph's calls that enter and leave regions by functions of this module.

    PyTorch writes levels of ``torch.vmap`` as numbers, which are correct only outside every other ``vmap``. So each
    number is replaced by the level that its region returned.

    Raises:
        CannotCapture: If the graph uses another transform.
    """
    levels: list[Node] = []
    where: str | None = None
    for node in list(graph.nodes):
        name = name_of(node)
        where = line_in(node.meta.get("stack_trace")) or where
        if name in _OPENS:
            new = _replace_node(graph, node, _OPENS[name], node.args)
            if _OPENS[name] is enter_vmap:
                levels.append(new)
        elif name in _CLOSES:
            _replace_node(graph, node, leave, ())
            if name == "_vmap_decrement_nesting":
                levels.pop()
        elif name in _LEVELS:
            level = node.args[_LEVELS[name]]
            assert isinstance(level, int)
            node.update_arg(_LEVELS[name], levels[level - 1])
        elif _is_transform(node) and name not in _HARMLESS:
            raise CannotCapture(
                f"it uses a transform of torch.func other than vmap ({name})", where
            )


def name_of(node: Node) -> str:
    """Return the name of the function that a node calls."""
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _replace_node(graph: Graph, node: Node, function: Callable[..., Any], args: Any) -> Node:
    with graph.inserting_before(node):
        new = graph.call_function(function, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _is_transform(node: Node) -> bool:
    origin = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and "functorch" in origin
