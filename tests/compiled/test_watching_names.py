"""Functions, global variables, builtins and settings that code finds by name: a change of each is noticed."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import logging
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.compiled.watching import Cases, Empty, assert_noticed

cases = Cases()
noticed, refused = cases.noticed, cases.refused


# Not as constants of the code that reads them.
ALPHA, BETA = "alpha", "beta"


@noticed
def attribute_of_a_function() -> Any:
    def read() -> Any:
        return read.beta  # type: ignore[attr-defined]

    read.beta = 0.0  # type: ignore[attr-defined]
    return read, lambda: setattr(read, "beta", 1.0)


@noticed
def later_attribute_of_a_function() -> Any:
    def read() -> Any:
        return getattr(read, "beta", 0.0)

    return read, lambda: setattr(read, "beta", 1.0)


@noticed
def attribute_of_a_function_that_did_not_run() -> Any:
    def other() -> None: ...

    return lambda: getattr(other, "beta", 0.0), lambda: setattr(other, "beta", 1.0)


@noticed
def attribute_of_the_function_of_a_method() -> Any:
    def other(self: Any) -> None: ...

    method = types.MethodType(other, Empty())
    return lambda: getattr(method, "beta", 0.0), lambda: setattr(other, "beta", 1.0)


@noticed
def attribute_of_a_partial() -> Any:
    part = functools.partial(max, 1)
    return lambda: getattr(part, "beta", 0.0), lambda: setattr(part, "beta", 1.0)


@noticed
def code_of_a_function() -> Any:
    def weight() -> float:
        return 0.0

    return lambda: weight(), lambda: setattr(weight, "__code__", (lambda: 1.0).__code__)


@noticed
def keyword_default() -> Any:
    def weight(*, beta: float = 0.0) -> float:
        return beta

    return lambda: weight(), lambda: weight.__kwdefaults__.update(beta=1.0)


@noticed
def later_global() -> Any:
    return lambda: globals().get("LATER", 0.0), lambda: globals().__setitem__("LATER", 1.0)


@noticed
def name_error() -> Any:
    def read() -> float:
        with contextlib.suppress(NameError):
            return LATER  # type: ignore[name-defined, no-any-return] # noqa: F821
        return 0.0

    return read, lambda: globals().__setitem__("LATER", 1.0)


@noticed
def global_hides_a_builtin() -> Any:
    return lambda: abs(-1.0), lambda: globals().__setitem__("abs", lambda value: 2.0)


@noticed
def builtin_replaced() -> Any:
    return lambda: LATER_BUILTIN(-1.0), lambda: setattr(builtins, "LATER_BUILTIN", len)  # type: ignore[name-defined] # noqa: F821


@noticed
def object_of_a_global_by_a_made_up_name() -> Any:
    return lambda: getattr(CONFIG, ALPHA), lambda: setattr(CONFIG, "alpha", 1.0)


@noticed
def module_that_the_loss_imports() -> Any:
    module = sys.modules["imported_by_the_loss"] = types.ModuleType("imported_by_the_loss")
    module.beta = 0.0  # type: ignore[attr-defined]

    def read() -> Any:
        import imported_by_the_loss  # type: ignore[import-not-found]

        return imported_by_the_loss.beta

    return read, lambda: setattr(module, "beta", 1.0)


@noticed
def module_that_importlib_finds() -> Any:
    module = sys.modules["imported_by_the_loss"] = types.ModuleType("imported_by_the_loss")
    return (
        lambda: getattr(importlib.import_module("imported_by_the_loss"), "beta", 0.0),
        lambda: setattr(module, "beta", 1.0),
    )


@noticed
def function_of_a_library() -> Any:
    before = torch.nn.functional.relu
    return (
        lambda: torch.nn.functional.relu(torch.ones(1)),
        lambda: (
            setattr(torch.nn.functional, "relu", lambda x: x),
            globals().__setitem__("UNDO", lambda: setattr(torch.nn.functional, "relu", before)),
        ),
    )


@noticed
def list_of_a_library() -> Any:
    return lambda: len(sys.argv), lambda: sys.argv.append("more")


@noticed
def environment_variable() -> Any:
    os.environ["CLIPGRAD_TEST"] = "0"
    return lambda: os.environ["CLIPGRAD_TEST"], lambda: os.environ.update(CLIPGRAD_TEST="1")


@noticed
def later_environment_variable() -> Any:
    return lambda: os.getenv("CLIPGRAD_TEST"), lambda: os.environ.update(CLIPGRAD_TEST="1")


@noticed
def level_of_a_logger() -> Any:
    logger = logging.getLogger("watched.by.a.test")
    logger.parent.setLevel(10)  # type: ignore[union-attr]
    return lambda: logger.isEnabledFor(15), lambda: logger.parent.setLevel(30)  # type: ignore[union-attr]


class Global:
    alpha: float


CONFIG = Global()


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    CONFIG.alpha = 0.0
    argv = list(sys.argv)
    yield
    sys.argv[:] = argv
    os.environ.pop("CLIPGRAD_TEST", None)
    sys.modules.pop("imported_by_the_loss", None)
    globals().pop("UNDO", lambda: None)()
    for name in ("LATER", "abs"):
        globals().pop(name, None)
    if hasattr(builtins, "LATER_BUILTIN"):
        del builtins.LATER_BUILTIN


@pytest.mark.parametrize("case", cases.all_noticed)
def test_change_is_noticed(case: str) -> None:
    builtins.LATER_BUILTIN = abs  # type: ignore[attr-defined]
    assert_noticed(cases.all_noticed[case])
