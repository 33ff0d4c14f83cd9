"""The arguments of a ``ClippedGrad``, flattened: parameters with names, batch leaves, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from clipgrad import _validate


def take(batch: Sequence[Any], index: slice | Tensor) -> list[Any]:
    """The samples of a flat batch at ``index``; constants stay."""

    def pick(leaf: Tensor) -> Tensor:
        return leaf[index if isinstance(index, slice) else index.to(leaf.device)]

    return [pick(leaf) if isinstance(leaf, Tensor) else leaf for leaf in batch]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, flattened."""

    names: list[str]
    params: list[Tensor]
    batch: list[Any]
    batch_size: int
    loss: Callable[[Sequence[Tensor], Sequence[Any]], Any]
    restore: Callable[[list[Tensor]], Any]
    fn: Callable[..., Any]
    others: list[Tensor]
    """Tensors among the arguments that are neither parameters nor batch."""
    constants: list[Any]
    """Everything among the batch and the further arguments that is no tensor."""
    structure: tuple[Any, ...]
    """How parameters, batch and further arguments are nested."""

    def rows(self, index: slice) -> list[Any]:
        return take(self.batch, index)

    @classmethod
    def bind(
        cls,
        fn: Callable[..., Any],
        argnums: int | tuple[int, ...],
        batch_argnums: tuple[int, ...] | None,
        args: tuple[Any, ...],
        *,
        aliased: bool = False,
    ) -> Inputs:
        """Flatten the arguments of a call.

        Args:
            fn: The loss.
            argnums: Positions of the parameters.
            batch_argnums: Positions of the batch; None for all others.
            args: The arguments.
            aliased: Hand the loss aliases of the tensors among its further arguments, so that a trace does not take
                one that the loss also finds elsewhere for this argument.
        """
        single = isinstance(argnums, int)
        argnums = (argnums,) if isinstance(argnums, int) else argnums
        argnums, batch_argnums = _validate.positions(argnums, batch_argnums, len(args))
        trainable = tuple(args[i] for i in argnums)
        names, params, spec = _flatten_parameters(trainable[0] if single else trainable)
        paths, batch_spec = tree_flatten_with_path(tuple(args[i] for i in batch_argnums))
        batch = [leaf.detach() if isinstance(leaf, Tensor) else leaf for _, leaf in paths]
        size = _validate.batch_size(batch, [keystr(path) for path, _ in paths])
        _validate.differentiable(params, batch)
        _validate.no_python_samples([args[i] for i in batch_argnums], size)
        used = {*argnums, *batch_argnums}
        others, other_spec = tree_flatten({i: args[i] for i in range(len(args)) if i not in used})
        if aliased:
            others = [
                leaf.detach() if isinstance(leaf, Tensor) and not leaf.requires_grad else leaf
                for leaf in others
            ]
        further = tree_unflatten(others, other_spec)

        def loss(leaves: Sequence[Tensor], sample: Sequence[Any]) -> Any:
            full = [further.get(i) for i in range(len(args))]
            restored = tree_unflatten(list(leaves), spec)
            for position, value in zip(argnums, (restored,) if single else restored, strict=True):
                full[position] = value
            for position, value in zip(
                batch_argnums, tree_unflatten(list(sample), batch_spec), strict=True
            ):
                full[position] = value
            return fn(*full)

        return cls(
            names,
            params,
            batch,
            size,
            loss,
            lambda leaves: tree_unflatten(leaves, spec),
            fn,
            [leaf for leaf in others if isinstance(leaf, Tensor)],
            [leaf for leaf in (*batch, *others) if not isinstance(leaf, Tensor)],
            (spec, batch_spec, other_spec, argnums, batch_argnums),
        )


def _flatten_parameters(tree: Any) -> tuple[list[str], list[Tensor], Any]:
    paths, spec = tree_flatten_with_path(tree)
    names = [".".join(_component(key) for key in path) for path, _ in paths]
    params = [leaf for _, leaf in paths]
    seen: dict[int, str] = {}
    for name, leaf in zip(names, params, strict=True):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"params: leaf {name!r} is {kind}; every leaf must be a floating-point tensor. Close over constants "
                "in fn instead."
            )
        if id(leaf) in seen:
            raise ValueError(
                f"params: {name!r} and {seen[id(leaf)]!r} are the same tensor; pass a tied weight once and use it "
                "twice inside fn, so that its two gradients are summed before the norm."
            )
        seen[id(leaf)] = name
    if not params:
        raise ValueError("params holds no tensor; there is nothing to differentiate.")
    return names, params, spec


def _component(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
