"""Small hostile models, by name: each stresses one way for per-sample clipping to go wrong."""

from . import (  # noqa: F401  (importing a family registers its architectures)
    algebra,
    attention,
    control,
    convolution,
    dense,
    embedding,
    indexing,
    losses,
    normalization,
    recurrent,
    refused,
    reparametrised,
    sequence,
    sharing,
    stochastic,
    vision,
)
from ._base import REGISTRY, Architecture, cast
from ._short import COMPILED, REPRESENTATIVES

ARCHITECTURES: dict[str, Architecture] = dict(REGISTRY)

__all__ = ["ARCHITECTURES", "COMPILED", "REPRESENTATIVES", "Architecture", "cast"]
