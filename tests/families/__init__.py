"""Small configurations of model families that people train, each with a batch that looks like theirs."""

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
