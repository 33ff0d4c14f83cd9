"""Whether a mode computes what clipgrad defines: its clipped gradient beside a plain loop over samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.peers._common import functional_loss, trained
from benchmarks.step import PrivateStep, Setting
from clipgrad.engine.reference import clipped_sum, per_sample_gradients_by_loop

TOLERANCE = 3e-4
"""Relative L2 error over the whole gradient, in float32.

PyTorch's float32 norm of some million values in a row is off by up to 7e-4 on the CPU, and Opacus's gradients of larger
CNNs with it by 2e-4. A clip that was skipped changes every workload's gradient by 1e-3 or more.
"""

MOST_SAMPLES = 8
MOST_ELEMENTS = 2**28
"""Elements of the oracle's per-sample gradients: 1 GiB."""


def checking(setting: Setting) -> Setting:
    """The same with few samples, and a clipping norm that some of them exceed and some do not.

    Raises:
        ValueError: If the samples' gradients are all equally long; no norm tells them apart.
    """
    model, _ = setting.model_and_batch()
    fit = MOST_ELEMENTS // sum(p.numel() for p in trained(model).values())
    size = max(2, min(MOST_SAMPLES, setting.batch_size, fit))
    small = replace(setting, batch_size=size)
    norms = _oracle(small)[1].double().sort().values
    gaps = norms[1:] - norms[:-1]
    middle = size // 2 - 1  # so that half of them are clipped ...
    if gaps[middle] < 1e-4 * norms[middle]:
        middle = int(
            gaps.argmax()
        )  # ... or, should those lie too close, as many as lie beyond the widest gap
    if gaps[middle] < 1e-4 * norms[middle]:
        raise ValueError(f"The samples' gradient norms are all close to {norms[0]:.6g}.")
    return replace(small, max_grad_norm=float((norms[middle] + norms[middle + 1]) / 2))


def oracle(setting: Setting, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The sum of clipped per-sample gradients, one sample at a time."""
    return _oracle(setting, dtype)[0]


class Check:
    """The oracle's answers for one setting, computed when first asked for and kept for all modes.

    Args:
        setting: What the steps to be compared were made for, from ``checking``.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._answers: dict[torch.dtype, dict[str, Tensor]] = {}

    def compare(self, step: PrivateStep) -> str | None:
        """None if the step's clipped gradient is the oracle's; else how it differs."""
        found = step.clipped_gradient()
        said = difference(found, self._oracle(torch.float32))
        if said is None:
            return None
        # Where two values of a max-pool window differ by their last bit, the float32 oracle may send the gradient the
        # other way than the step: 6e-4 of cnn-large's gradient. In float64 there is one answer.
        return None if difference(found, self._oracle(torch.float64)) is None else said

    def _oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if dtype not in self._answers:
            self._answers[dtype] = oracle(self.setting, dtype)
        return self._answers[dtype]


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """How a gradient differs from the one that is wanted; None if only by rounding."""
    if missing := [name for name in wanted if name not in found]:
        return f"no gradient for {_names(missing)}"
    if unknown := [name for name in found if name not in wanted]:
        return f"gradient for unknown parameters: {_names(unknown)}"
    if bad := [name for name in wanted if found[name].shape != wanted[name].shape]:
        return f"wrong shape of {_names(bad)}"
    errors = {name: _distance(found[name], wanted[name]) for name in wanted}
    error, size = _norm(errors.values()), _norm(_distance(g) for g in wanted.values())
    if error <= TOLERANCE * size:  # false for NaN
        return None
    length = _norm(_distance(found[name]) for name in wanted)
    worst = max(errors, key=lambda name: errors[name])
    return (
        f"relative error {error / size:.2g}, {length / size:.4g} times as long as the oracle's gradient, "
        f"most of it in {worst}"
    )


def relative_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """L2 over all parameters of ``wanted``."""
    errors = _norm(_distance(found[name], wanted[name]) for name in wanted)
    return errors / _norm(_distance(g) for g in wanted.values())


def _oracle(
    setting: Setting, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    model, batch = setting.model_and_batch()
    model = model.to(dtype)
    batch = tuple(leaf.to(dtype) if leaf.is_floating_point() else leaf for leaf in batch)
    loss = functional_loss(setting.workload, model)
    _, gradients = per_sample_gradients_by_loop(loss, dict(trained(model)), *batch)
    return clipped_sum(gradients, setting.max_grad_norm)


def _distance(a: Tensor, b: Tensor | None = None) -> float:
    a = a.detach().double().cpu()
    return float((a if b is None else a - b.detach().double().cpu()).norm())


def _norm(parts: Iterable[float]) -> float:
    return math.sqrt(sum(part * part for part in parts))


def _names(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
