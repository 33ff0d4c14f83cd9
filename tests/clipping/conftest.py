"""What the tests of clipping start from."""

from __future__ import annotations

from tests.compiled.conftest import graphs, seed

__all__ = ["graphs", "seed"]
