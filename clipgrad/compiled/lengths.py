"""Let one graph serve batches whose sizes differ, such as texts that are padded to the longest of their batch.

Rows that may differ have a symbol from the first batch on. For other sizes the first batch gets a graph of its own. If
a later batch differs from it in some sizes only, the step is traced once more with symbols for these sizes. PyTorch
records the assumptions of the trace about a symbol as guards (``s >= 3``, ``8 * s**2 <= 2**25``). A graph serves a
batch only if the batch's sizes fulfil all guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import sympy  # type: ignore[import-untyped]  # PyTorch's guards are its expressions.
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from clipgrad.compiled.shape import layout_of
from clipgrad.errors import CompileError

Shapes = tuple[tuple[int, ...], ...]
"""The shape of each tensor of a batch."""


class LengthsError(CompileError):
    """This error says that a graph with symbols serves only one length, or not even the length of its own batch."""


def shapes_of(batch: Sequence[Any]) -> Shapes:
    """Return the sizes of a batch that may differ from one batch to the next."""
    return tuple(tuple(leaf.shape) for leaf in batch if isinstance(leaf, Tensor))


def with_rows(shapes: Shapes, rows: int) -> Shapes:
    """Return the sizes of a batch with another number of rows."""
    return tuple((rows, *shape[1:]) for shape in shapes)


class Lengths:
    """This class holds the sizes of the batches that one graph serves.

    Args:
        seen: Sizes of every batch for which a graph was made; the last one is the present batch. The graph gets a
            symbol for each size that differs.
        on_real_tensors: Whether a step without symbols is traced on the batch itself. Fake tensors take no memory, but
            some losses cannot be traced on them.
    """

    def __init__(self, *seen: Shapes, on_real_tensors: bool = False) -> None:
        self._seen = seen
        self._histories = [list(zip(*leaves, strict=True)) for leaves in zip(*seen, strict=True)]
        self._answers: dict[Shapes, bool] = {}
        self._sizes: list[list[Any]] = [[history[-1] for history in of] for of in self._histories]
        self._stand_ins: list[Tensor] = []
        self.mode: FakeTensorMode | None = None
        if self.have_symbols or not on_real_tensors:
            self.mode = FakeTensorMode(shape_env=ShapeEnv())

    @property
    def seen(self) -> tuple[Shapes, ...]:
        """Return the sizes for which a graph was made."""
        return self._seen

    def refuse_unless_open(self, shapes: Shapes) -> None:
        """Refuse a graph in which a symbol became a number, or which does not serve the present batch.

        Raises:
            LengthsError: If the graph is refused; the message shows its guards.
        """
        if self.mode is None:
            return
        replacements = self._env.replacements
        symbols = {size for of in self._sizes for size in of if not isinstance(size, int)}
        if any(replacements.get(s, s).is_number for s in symbols) or not self._allow(shapes):
            guards = ", ".join(str(guard.expr) for guard in self._env.guards)
            raise LengthsError(f"the step's graph serves only some lengths of its batch: {guards}")

    def examples(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return fake tensors in place of the graph's arguments, with which the graph is compiled.

        PyTorch's caches of compiled code accept only graphs whose fake tensors have a ``ShapeEnv``.
        """
        if self.mode is None:
            mode = FakeTensorMode(shape_env=ShapeEnv())
            return [mode.from_tensor(tensor, static_shapes=True) for tensor in flat]
        known, self._stand_ins = self._stand_ins, []
        return [*known, *map(self._fixed, flat[len(known) :])]

    @property
    def have_symbols(self) -> bool:
        """Return whether some size differs from batch to batch."""
        return any(_differs(history) for of in self._histories for history in of)

    @cached_property
    def differ(self) -> bool:
        """Return whether a size other than the number of rows differs from batch to batch."""
        return any(_differs(history) for of in self._histories for history in of[1:])

    def serve(self, shapes: Shapes) -> bool:
        """Return whether the compiled graph serves batches of these sizes."""
        if shapes not in self._answers:
            self._answers[shapes] = self._allow(shapes)
        return self._answers[shapes]

    def fewest_rows(self) -> int:
        """Return the smallest number of rows from which on the graph serves each, up to that of the batch at hand."""
        largest = self._seen[-1]
        fewest = largest[0][0]
        while fewest > 1 and self.serve(with_rows(largest, fewest - 1)):
            fewest -= 1
        return fewest

    def _allow(self, shapes: Shapes) -> bool:
        """Return whether the guards recorded so far hold for these sizes."""
        if self.mode is None:
            return shapes == self._seen[-1]
        values: dict[Any, int] = {}
        for sizes, shape in zip(self._sizes, shapes, strict=True):
            if len(sizes) != len(shape):
                return False
            for known, size in zip(sizes, shape, strict=True):
                if known != size and (
                    isinstance(known, int) or values.setdefault(known, size) != size
                ):
                    return False
        return self._hold(values)

    def _hold(self, values: dict[Any, int]) -> bool:
        env = self._env
        return all(size in env.bound_sympy(symbol) for symbol, size in values.items()) and all(
            guard.expr.xreplace(_integers(values)) == sympy.true for guard in env.guards
        )

    @property
    def _env(self) -> ShapeEnv:
        assert self.mode is not None
        env: ShapeEnv | None = self.mode.shape_env
        assert env is not None
        return env

    def with_symbols(
        self,
        params: Sequence[Tensor],
        batch: Sequence[Tensor],
        read: Sequence[Tensor],
        padding: Tensor,
        bounds: Tensor,
    ) -> list[Tensor]:
        """Return fake tensors for the arguments of a graph, in the order of ``trace``.

        Tensors of the batch and the mask of its padding get the symbols.
        """
        longest = [tuple(map(_largest, of)) for of in self._histories]
        shared = self._named_alike(longest)
        before = list(map(self._fixed, params))
        samples = []
        for index, (leaf, sizes) in enumerate(zip(batch, longest, strict=True)):
            kinds = [self._kind(history, shared) for history in self._histories[index]]
            made = self._stand_in(_like(leaf, sizes), kinds)
            self._sizes[index] = [_expression(size) for size in made.shape]
            samples.append(made)
        after = list(map(self._fixed, read))
        mask = samples[0].new_empty(samples[0].shape[0], dtype=padding.dtype)
        self._stand_ins = [*before, *samples, *after, mask, self._fixed(bounds)]
        return self._stand_ins

    def _named_alike(self, longest: Sequence[tuple[int, ...]]) -> set[int]:
        """Return the largest sizes whose axes had equal sizes in all batches, so that they can share one symbol."""
        owners: dict[int, set[tuple[int, ...]]] = {}
        for of, sizes in zip(self._histories, longest, strict=True):
            for history, size in zip(of, sizes, strict=True):
                owners.setdefault(size, set()).add(history)
        return {size for size, histories in owners.items() if len(histories) == 1}

    def _kind(self, history: tuple[int, ...], shared: set[int]) -> DimDynamic:
        if not _differs(history):
            return DimDynamic.STATIC
        return DimDynamic.DUCK if max(history) in shared else DimDynamic.DYNAMIC

    def _fixed(self, tensor: Tensor) -> Tensor:
        assert self.mode is not None
        # With a source, the value of a tensor without axes would become a symbol.
        made: Tensor = self.mode.from_tensor(tensor, static_shapes=True)
        return made

    def _stand_in(self, tensor: Tensor, kinds: Sequence[DimDynamic]) -> Tensor:
        assert self.mode is not None
        source = ConstantSource(f"argument_{len(self.mode.fake_tensor_converter.tensor_memo)}")
        context: Any = StatelessSymbolicContext(dynamic_sizes=list(kinds))
        made: Tensor = self.mode.from_tensor(tensor, source=source, symbolic_context=context)
        return made


def _like(leaf: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return uninitialised memory of other sizes in the layout of a batch leaf."""
    return torch.empty(sizes, dtype=leaf.dtype, device=leaf.device, memory_format=layout_of(leaf))


def _differs(history: Sequence[int]) -> bool:
    """Return whether a size gets a symbol: it differs from batch to batch, and the present batch's is not 1.

    PyTorch makes a number of a symbol whose size is 1.
    """
    return len(set(history)) > 1 and history[-1] > 1


def _largest(history: Sequence[int]) -> int:
    return max(history) if _differs(history) else history[-1]


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _integers(values: dict[Any, int]) -> dict[Any, Any]:
    return {symbol: sympy.Integer(size) for symbol, size in values.items()}
