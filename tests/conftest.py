"""What is collected: nightly tests when asked for, and tests of a GPU where there is one."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

WITHOUT_GPU = ["test_cuda.py", "test_recurrent_cuda.py", "compiled/test_cuda.py"]
collect_ignore = [] if torch.cuda.is_available() else WITHOUT_GPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run what is marked nightly")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep what is imported and collected out of Python's garbage collection, which would look at it again and again.

    Millions of objects stay until the end. With them a collection takes most of a second, and there are hundreds.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not _wanted(config, item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _wanted(config, item)]


def _wanted(config: pytest.Config, item: pytest.Item) -> bool:
    if item.get_closest_marker("nightly") and not config.getoption("--nightly"):
        return False
    return not item.get_closest_marker("cuda") or torch.cuda.is_available()
