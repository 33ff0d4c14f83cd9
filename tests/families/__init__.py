"""This package has small configurations of common model families, each with a typical batch."""

from tests.families import (  # noqa: F401  each adds its families
    adapters,
    audio,
    decoders,
    encoders,
    plain,
    sequences,
    vision,
)
from tests.families._family import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
