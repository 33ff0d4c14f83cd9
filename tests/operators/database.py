"""PyTorch's database of operators; its import needs the package ``expecttest``."""

from __future__ import annotations

from typing import Any

import torch


def differentiable() -> list[Any]:
    """The operators that have a gradient in float64."""
    flags = torch.backends.flags_frozen.__globals__  # the module itself is hidden behind an object
    before = flags["__allow_nonbracketed_mutation_flag"]
    from torch.testing._internal.common_methods_invocations import op_db  # slow: 10 s

    # The import forbids to set torch.backends.cudnn.allow_tf32 and its like, in the whole process.
    flags["__allow_nonbracketed_mutation_flag"] = before
    return [op for op in op_db if op.supports_autograd and torch.float64 in op.dtypes]
