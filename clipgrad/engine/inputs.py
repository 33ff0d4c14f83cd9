"""The arguments of a ``ClippedGrad``, flattened: parameters with names, batch leaves, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from clipgrad import _validate
from clipgrad.engine.advice import note_arguments
from clipgrad.engine.foreign_code import refuse_subclasses


def take(batch: Sequence[Any], index: slice | Tensor) -> list[Any]:
    """The samples of a flat batch at ``index``; constants stay."""

    def pick(leaf: Tensor) -> Tensor:
        return leaf[index if isinstance(index, slice) else index.to(leaf.device)]

    return [pick(leaf) if isinstance(leaf, Tensor) else leaf for leaf in batch]


def copied(batch: Sequence[Any]) -> list[Any]:
    """All samples of a flat batch, in memory of their own; constants stay."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in batch]


class _Flat(NamedTuple):
    """A pytree taken apart.

    Attributes:
        leaves: In order.
        structure: Equal for two trees exactly if they are nested alike.
        restore: From as many leaves to the tree.
        paths: The keys that lead to each leaf.
    """

    leaves: list[Any]
    structure: Any
    restore: Callable[[Sequence[Any]], Any]
    paths: Callable[[], list[tuple[Any, ...]]]


_TENSORS = {Tensor, nn.Parameter}


def _flat(tree: Any) -> _Flat:
    """Take a tree apart; a flat dictionary or tuple of tensors, the usual case, without PyTorch's general walk."""
    kind = type(tree)
    if (
        kind is dict
        and _TENSORS.issuperset(map(type, tree.values()))
        and {str}.issuperset(map(type, tree))
    ):
        keys = tuple(tree)
        return _Flat(
            list(tree.values()),
            (dict, keys),
            lambda leaves: dict(zip(keys, leaves, strict=True)),
            lambda: _paths(tree),
        )
    if kind is tuple and _TENSORS.issuperset(map(type, tree)):
        return _Flat(list(tree), (tuple, len(tree)), tuple, lambda: _paths(tree))
    leaves, spec = tree_flatten(tree)
    return _Flat(
        leaves, spec, lambda values: tree_unflatten(list(values), spec), lambda: _paths(tree)
    )


def _paths(tree: Any) -> list[tuple[Any, ...]]:
    return [path for path, _ in tree_flatten_with_path(tree)[0]]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, flattened."""

    names: list[str]
    params: list[Tensor]
    batch: list[Any]
    batch_size: int
    loss: Callable[[Sequence[Tensor], Sequence[Any]], Any]
    restore: Callable[[Sequence[Tensor]], Any]
    fn: Callable[..., Any]
    others: list[Tensor]
    """Tensors among the arguments that are neither parameters nor batch."""
    constants: list[Any]
    """Everything among the batch and the further arguments that is no tensor."""
    structure: tuple[Any, ...]
    """How parameters, batch and further arguments are nested."""
    batch_paths: Callable[[], list[str]]
    """Where each leaf of the batch stands in it, for a message."""

    def rows(self, index: slice) -> list[Any]:
        whole = index.start == 0 and index.stop == self.batch_size
        return list(self.batch) if whole else take(self.batch, index)

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
        parameters = _flat(trainable[0] if single else trainable)
        names, params = _parameter_names(parameters), parameters.leaves
        samples = _flat(tuple(args[i] for i in batch_argnums))
        _validate.dense("params", parameters.leaves, parameters.paths)
        refuse_subclasses(parameters.leaves, "a parameter")
        _validate.dense("batch", samples.leaves, samples.paths)
        refuse_subclasses(samples.leaves, "the batch")
        batch = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in samples.leaves]

        def batch_paths() -> list[str]:
            return list(map(keystr, samples.paths()))

        size = _validate.batch_size(batch, batch_paths)
        _validate.differentiable(params, batch)
        _validate.no_python_samples([args[i] for i in batch_argnums], size)
        used = {*argnums, *batch_argnums}
        rest = _flat({i: args[i] for i in range(len(args)) if i not in used})
        others = rest.leaves
        refuse_subclasses(others, "an argument of the loss")
        if aliased:
            others = [
                leaf.detach() if isinstance(leaf, Tensor) and not leaf.requires_grad else leaf
                for leaf in others
            ]
        further = rest.restore(others)

        def loss(leaves: Sequence[Tensor], sample: Sequence[Any]) -> Any:
            full = [further.get(i) for i in range(len(args))]
            restored = parameters.restore(leaves)
            for position, value in zip(argnums, (restored,) if single else restored, strict=True):
                full[position] = value
            for position, value in zip(batch_argnums, samples.restore(sample), strict=True):
                full[position] = value
            try:
                return fn(*full)
            except TypeError as error:
                note_arguments(error, fn, full, "gradient(params, *batch)")
                raise

        return cls(
            names,
            params,
            batch,
            size,
            loss,
            parameters.restore,
            fn,
            [leaf for leaf in others if isinstance(leaf, Tensor)],
            [leaf for leaf in (*batch, *others) if not isinstance(leaf, Tensor)],
            (parameters.structure, samples.structure, rest.structure, argnums, batch_argnums),
            batch_paths,
        )


def _parameter_names(parameters: _Flat) -> list[str]:
    """The name of each parameter, of parameters that can be differentiated."""
    leaves, structure = parameters.leaves, parameters.structure
    if type(structure) is tuple and structure[0] is dict:
        names = list(structure[1])
    else:
        names = [".".join(map(_component, path)) for path in parameters.paths()]
    usual = bool(leaves) and _TENSORS.issuperset(map(type, leaves))
    if (
        usual
        and all(map(Tensor.is_floating_point, leaves))
        and len(set(map(id, leaves))) == len(leaves)
    ):
        return names
    seen: dict[int, str] = {}
    for name, leaf in zip(names, leaves, strict=True):
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
    if not leaves:
        raise ValueError("params holds no tensor; there is nothing to differentiate.")
    return names


def _component(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
