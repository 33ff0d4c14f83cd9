"""Small configurations of model families that people train, each with a batch that looks like theirs."""

from tests.families._family import FAMILIES, Family

# Each file adds its families.
from tests.families import adapters, audio, decoders, encoders, plain, sequences, vision  # noqa: F401, I001

__all__ = ["FAMILIES", "Family"]
