"""Provide two processes for the tests of this folder, and four for nightly tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.processes import Processes


class Pool:
    """This class holds process groups by size, which it starts at their first use."""

    def __init__(self) -> None:
        self._made: dict[int, Processes] = {}

    def __call__(self, size: int) -> Processes:
        if size in self._made and self._made[size].broken:
            self._made.pop(size).close()
        if size not in self._made:
            self._made[size] = Processes(size)
        return self._made[size]

    def close(self) -> None:
        for processes in self._made.values():
            processes.close()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()
