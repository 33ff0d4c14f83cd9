"""Small configurations of model families that people train, each with a batch that looks like theirs."""

# Each file adds its families.
from tests.families import adapters, audio, decoders, encoders, plain, sequences, vision  # noqa: F401
from tests.families._family import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
