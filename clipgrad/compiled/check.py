"""Compare the compiled step with the eager step before its results are used.

The comparison covers every clipped sum, loss, norm, finite flag and auxiliary output of a microbatch, at the same RNG
state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from clipgrad.clipping import Clipping
from clipgrad.engine.clip_and_sum import MicrobatchResult
from clipgrad.errors import CompileMismatchError

# Relative to the sum of all samples' clipped norms. Rounding may move an input near zero across a kink of an activation
# and change one sample by a thousandth. A sample that is left out or not clipped changes norms or sums by more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TF32 = 1e-2


def is_compared(run: int) -> bool:
    """Return whether a graph's run with this number, from 1, is compared: 1, 2, 4, 8 and so on.

    So a change that PyTorch's guards do not notice cannot stay unnoticed for long.
    """
    return run & (run - 1) == 0


def tolerance(module: GraphModule, device: torch.device) -> float:
    """Return how much two correct runs of a graph may differ by rounding, given its least precise dtype."""
    values = tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    found = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if device.type == "cuda" and tf32 and torch.float32 in dtypes:
        found = max(found, _TF32)
    return found


def compare(
    compiled: MicrobatchResult,
    eager: MicrobatchResult,
    names: Sequence[str],
    clipping: Clipping,
    slack: float,
) -> None:
    """Raise ``CompileMismatchError`` if the compiled result differs from the eager result by more than ``slack``.

    Both results are of the same rows; ``tolerance`` returns the slack.
    """
    counted = [norms * clipping.factors(norms, group) for group, norms in enumerate(eager.norms)]
    scale = float(torch.stack(counted).nan_to_num(0.0, 0.0, 0.0).sum())
    wrong = [
        f"clipped sum of {name!r} (off by {error / max(scale, 1e-300):.1e} of all contributions)"
        for name, total, expected in zip(names, compiled.sums, eager.sums, strict=True)
        if not (error := _distance(total, expected)) <= slack * scale
    ]
    if not torch.equal(compiled.nonfinite, eager.nonfinite):
        wrong.append("which samples are finite")
    others = {"losses": (compiled.values, eager.values)}
    for index, pair in enumerate(zip(compiled.norms, eager.norms, strict=True)):
        others[f"norms {index or ''}".strip()] = pair
    for index, pair in enumerate(zip(*map(tree_leaves, (compiled.aux, eager.aux)), strict=True)):
        others[f"aux {index}"] = pair
    for name, (found, expected) in others.items():
        if not _is_close(found, expected, slack):
            wrong.append(name)
    if wrong:
        raise CompileMismatchError(
            f"the compiled step differs from the eager one: {', '.join(wrong[:4])}"
            f"{', ...' if len(wrong) > 4 else ''}. Its result was not used. Leave compile out, and please report the "
            "loss. (A loss with rounding or argmax may differ on one batch without a fault in the compiled step.)"
        )


def _distance(total: Tensor, expected: Tensor) -> float:
    if total.shape != expected.shape or total.dtype != expected.dtype:
        return float("inf")
    return float(torch.linalg.vector_norm((total - expected).double()))


def _is_close(found: Tensor, expected: Tensor, slack: float) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not found.is_floating_point():
        return bool(torch.equal(found, expected))
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    close = torch.isclose(
        found.double(), expected.double(), rtol=slack, atol=slack * scale, equal_nan=True
    )
    return bool(close.all())
