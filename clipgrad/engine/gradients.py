"""Compute norms and clipped sums of the parameters from a settled tape, including uses through shared expressions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipgrad._functorch import (
    expose_or_broadcast,
    hide_batch_axis,
    is_symbol,
    vmap_level,
    without_tracing,
)
from clipgrad.engine.bundle import Bundle, make_bundle
from clipgrad.engine.tape import Tape
from clipgrad.engine.tracked import Tracked
from clipgrad.kernels.selection import select_rows
from clipgrad.rules.canonical import PerSample
from clipgrad.rules.operands import sum_of, widen
from clipgrad.rules.row_norms import row_norms_squared

# In a graph, TorchInductor makes one loop of small norms on a CPU, but one kernel for each of them on a GPU.
_JOINS_IN_GRAPHS = {"cuda"}


class Gradients:
    """This class holds the per-sample gradients of one microbatch, each in the form that its strategy chose.

    A parameter's gradient has several parts: its own uses, and the uses of every expression computed from it. If the
    parts touch different elements (the three slices of a packed projection), their squared norms are added. Otherwise
    the parts are pulled back and summed per sample first.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._batch_size = tape.batch_size
        for entry in tape.tracked:
            entry.merge_kept_gradients()
        self._parts: list[list[Tracked]] = [[] for entry in tape.tracked if not entry.derived]
        for entry in tape.tracked:
            if entry.has_gradient:
                for index in entry.parameters:
                    self._parts[index].append(entry)
        self.parameters = [entry.shared for entry in tape.tracked if not entry.derived]
        self._summed: dict[int, Tensor] = {}
        self._pulled: dict[int, list[Tensor | None]] = {}
        self._bundled: dict[int, Bundle] = {}

    def squared_norms(self, members: Sequence[int]) -> Tensor:
        """Return the squared norms over some parameters together, ``[B]``; zeros if no gradient reached any of them.

        Each parameter's index may be in only one call.
        """
        found = []
        joined: set[int] = set()
        traced = get_proxy_mode() is not None
        if len(members) > 1 and (not traced or self._tape.anchor.device.type in _JOINS_IN_GRAPHS):
            bundle = make_bundle(self._kept_alone(members))
            if bundle is not None:
                joined = set(bundle.indices)
                found.append(bundle.squared_norms())
                if not traced:  # the results of a graph must not share memory
                    self._bundled.update(dict.fromkeys(joined, bundle))
        alone = (self._squared_norms(index) for index in members if index not in joined)
        found += [norms for norms in alone if norms is not None]
        if not found:
            return widen(self._tape.anchor).new_zeros(self._batch_size)
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]

    def _kept_alone(self, members: Sequence[int]) -> dict[int, Tensor]:
        """Return kept gradients of parameters whose gradient has no other part."""
        found = {}
        for index in members:
            parts = self._parts[index]
            if len(parts) == 1 and not parts[0].derived and not parts[0].uses:
                kept = parts[0].kept
                if kept is not None:
                    found[index] = kept
        return found

    def _squared_norms(self, index: int) -> Tensor | None:
        parts = self._parts[index]
        if index in self._summed:
            return row_norms_squared(self._summed[index])
        if not parts:
            return None
        if all(part.injective for part in parts) and self._disjoint(index):
            return sum_of([part.squared_norms() for part in parts])
        return row_norms_squared(self.per_sample(index))

    def per_sample(self, index: int) -> Tensor:
        """Return the per-sample gradients of one parameter, ``[B, *shape]``."""
        if index not in self._summed:
            total: Tensor | None = None
            for part in self._parts[index]:
                gradient = self._pull_back(part, index) if part.derived else part.per_sample()
                if gradient is not None:
                    total = gradient if total is None else total + gradient
            if total is None:
                shape = self._tape.tracked[index].shared.shape
                total = self._tape.anchor.new_zeros(()).expand(self._batch_size, *shape)
            self._summed[index] = total
        return self._summed[index]

    def replace(self, gradients: Sequence[Tensor]) -> None:
        """Put other per-sample gradients, ``[B, *shape]``, in the place of all parameters' own."""
        self._summed = dict(enumerate(gradients))
        self._parts = [[] for _ in gradients]

    def weighted_sum(self, index: int, factors: Tensor) -> Tensor:
        """Return ``sum_b factors[b] g_b`` of one parameter; zeros if no gradient reached it."""
        if index in self._bundled:
            return self._bundled[index].weighted_sum(index, factors)
        if index in self._summed:
            return PerSample(self._summed[index]).weighted_sum(factors)
        total: Tensor | None = None
        for part in self._parts[index]:
            gradient: Tensor | None = part.weighted_sum(factors)
            if part.derived and gradient is not None:
                source = self._tape.tracked[index]
                expression, parameter = (
                    (part.exact, source.exact) if part.injective else (part.shared, source.shared)
                )
                (gradient,) = torch.autograd.grad(
                    expression,
                    [parameter],
                    gradient.to(expression.dtype),
                    retain_graph=True,
                    allow_unused=True,
                )
            if gradient is not None:
                total = gradient if total is None else total + gradient
        return torch.zeros_like(self._tape.tracked[index].value) if total is None else total

    def select(self, keep: Tensor) -> None:
        """Make the gradient of every sample outside the mask exactly zero."""
        for bundle in set(self._bundled.values()):
            bundle.select(keep)
        for entry in self._tape.tracked:
            entry.select(keep)
        # Keep the sums per sample: pulling back a clipped sum instead would round it to the expression's dtype.
        self._summed = {index: select_rows(total, keep) for index, total in self._summed.items()}
        self._pulled.clear()

    def _pull_back(self, part: Tracked, index: int) -> Tensor | None:
        key = id(part)
        if key not in self._pulled:
            sources = [self._tape.tracked[i].shared for i in part.parameters]
            gradients = part.per_sample().to(part.shared.dtype)
            self._pulled[key] = _pulled_back(part.shared, sources, gradients)
        gradient = self._pulled[key][part.parameters.index(index)]
        return None if gradient is None else widen(gradient)

    def _disjoint(self, index: int) -> bool:
        """Return whether no element of the parameter is reached through two parts."""
        parts = self._parts[index]
        if len(parts) == 1:
            return True
        if any(not part.derived for part in parts):
            return False
        source = self._tape.tracked[index].shared
        # The result depends on shapes alone, so it may be a constant of a graph.
        with without_tracing():
            touched = torch.zeros_like(source)
            for part in parts:
                (image,) = torch.autograd.grad(
                    part.shared, [source], torch.ones_like(part.shared), retain_graph=True
                )
                touched += image
            return bool((touched <= 1).all())


def _pulled_back(
    output: Tensor, sources: Sequence[Tensor], gradients: Tensor
) -> list[Tensor | None]:
    """Return the vector-Jacobian product of each sample's gradient of ``output``, for each source."""
    size = gradients.shape[0]
    if not is_symbol(size):
        return list(
            torch.autograd.grad(
                output,
                sources,
                gradients,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        )
    # With ``is_grads_batched`` PyTorch would make a number of the symbol.
    with vmap_level(size, "error") as level:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            output,
            sources,
            hide_batch_axis(gradients, level),
            retain_graph=True,
            allow_unused=True,
        )
        return [
            None if total is None else expose_or_broadcast(total, level, size) for total in found
        ]
