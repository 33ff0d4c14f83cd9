"""The arguments of a ``ClippedGrad``, flattened: parameters with names, batch leaves, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import (
    MappingKey,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from clipgrad import _validate
from clipgrad.engine.advice import note_arguments
from clipgrad.engine.foreign_code import refuse_subclasses


def copied(batch: Sequence[Any]) -> list[Any]:
    """All samples of a flat batch, in memory of their own; constants stay."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in batch]


Restore = Callable[[Sequence[Any]], Any]
Loss = Callable[[Sequence[Tensor], Sequence[Any]], Any]
"""From the leaves of the parameters and of one sample to what the user's function returns."""


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
    restore: Restore
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


class SampleCall(NamedTuple):
    """How the user's own function is called on one sample, so that PyTorch can capture it.

    Attributes:
        fn: The user's function.
        arguments: From the leaves of one sample to the arguments of ``fn``.
        parameters: The parameters as ``fn`` finds them; each requires grad.
        context: What has to hold while ``fn`` runs.
    """

    fn: Callable[..., Any]
    arguments: Callable[[Sequence[Any]], tuple[Any, ...]]
    parameters: list[Tensor]
    context: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call as lists of leaves, which is the form that everything below works on.

    Attributes:
        names: Of the parameters.
        params: The parameters.
        batch: Leaves of the batch: tensors with a leading batch axis, and constants.
        batch_size: Samples in it.
        loss: From the parameters' leaves and one sample's leaves to what the user's function returns.
        sample_call: Tells how the same function is called on one sample, for PyTorch's capture.
    """

    names: list[str]
    params: list[Tensor]
    batch: list[Any]
    batch_size: int
    loss: Loss
    sample_call: Callable[[], SampleCall]

    def rows(self, index: slice) -> list[Any]:
        """The leaves of some of the samples."""
        whole = index.start == 0 and index.stop == self.batch_size
        if whole:
            return list(self.batch)
        return [leaf[index] if isinstance(leaf, Tensor) else leaf for leaf in self.batch]


def of_model(
    loss_fn: Callable[..., Any],
    model: nn.Module,
    names: list[str],
    params: list[Tensor],
    holding: Callable[[Sequence[Tensor]], AbstractContextManager[None]],
    batch: tuple[Any, ...],
) -> Inputs:
    """The inputs of ``loss_fn(model, *batch)``.

    Args:
        loss_fn: The loss.
        model: The model that holds the parameters.
        names: Names of the parameters.
        params: The parameters, each once.
        holding: Puts other tensors in the parameters' places while a body runs.
        batch: Pytrees of tensors.

    Raises:
        ValueError: If the batch or a parameter cannot be clipped per sample.
    """
    _check_parameters(params, lambda: [(MappingKey(name),) for name in names])
    for name, param in zip(names, params, strict=True):
        _refuse_integers(name, param)
    samples = _flat(batch)
    leaves, size = _checked_batch(samples, batch, params)

    def loss(parameters: Sequence[Tensor], sample: Sequence[Any]) -> Any:
        with holding(parameters):
            return loss_fn(model, *samples.restore(sample))

    def sample_call() -> SampleCall:
        return SampleCall(
            loss_fn,
            lambda sample: (model, *samples.restore(sample)),
            params,
            lambda: holding(params),
        )

    return Inputs(names, params, leaves, size, loss, sample_call)


def of_arguments(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...],
    batch_argnums: tuple[int, ...] | None,
    args: tuple[Any, ...],
) -> tuple[Inputs, Restore]:
    """The inputs of ``fn(*args)``, and the way back from leaves to the parameters' structure.

    Args:
        fn: The loss.
        argnums: Positions of the parameters.
        batch_argnums: Positions of the batch; None for all others.
        args: The arguments.

    Raises:
        ValueError: If the arguments do not fit together.
    """
    single = isinstance(argnums, int)
    argnums = (argnums,) if isinstance(argnums, int) else argnums
    argnums, batch_argnums = _validate.positions(argnums, batch_argnums, len(args))
    trainable = tuple(args[i] for i in argnums)
    parameters = _flat(trainable[0] if single else trainable)
    _check_parameters(parameters.leaves, parameters.paths)
    names = _parameter_names(parameters)
    trees = tuple(args[i] for i in batch_argnums)
    samples = _flat(trees)
    batch, size = _checked_batch(samples, trees, parameters.leaves)
    used = {*argnums, *batch_argnums}
    rest = [args[i] for i in range(len(args)) if i not in used]
    refuse_subclasses(tree_leaves(rest), "an argument of the loss")

    def full(leaves: Sequence[Tensor], sample: Sequence[Any]) -> list[Any]:
        """The arguments of ``fn`` with other parameters and samples in their places."""
        full = list(args)
        restored = parameters.restore(leaves)
        for position, value in zip(argnums, (restored,) if single else restored, strict=True):
            full[position] = value
        for position, value in zip(batch_argnums, samples.restore(sample), strict=True):
            full[position] = value
        return full

    def loss(leaves: Sequence[Tensor], sample: Sequence[Any]) -> Any:
        given = full(leaves, sample)
        try:
            return fn(*given)
        except TypeError as error:
            note_arguments(error, fn, given, "gradient(params, *batch)")
            raise

    def sample_call() -> SampleCall:
        usual = [p.requires_grad and p.is_leaf for p in parameters.leaves]
        trained = [
            p if is_usual else p.detach().requires_grad_()
            for p, is_usual in zip(parameters.leaves, usual, strict=True)
        ]
        return SampleCall(fn, lambda sample: tuple(full(trained, sample)), trained, nullcontext)

    return Inputs(names, parameters.leaves, batch, size, loss, sample_call), parameters.restore


def _check_parameters(params: Sequence[Any], paths: Callable[[], list[tuple[Any, ...]]]) -> None:
    _validate.dense("params", params, paths)
    refuse_subclasses(params, "a parameter")


def _checked_batch(
    samples: _Flat, trees: Sequence[Any], params: Sequence[Tensor]
) -> tuple[list[Any], int]:
    """The leaves of a batch, detached, and how many samples there are."""
    _validate.dense("batch", samples.leaves, samples.paths)
    refuse_subclasses(samples.leaves, "the batch")
    batch = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in samples.leaves]

    def batch_paths() -> list[str]:
        return list(map(keystr, samples.paths()))

    size = _validate.batch_size(batch, batch_paths)
    _validate.differentiable(params, batch)
    _validate.no_python_samples(trees, size)
    return batch, size


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
        _refuse_integers(name, leaf)
        if id(leaf) in seen:
            raise ValueError(
                f"params: {name!r} and {seen[id(leaf)]!r} are the same tensor; pass a tied weight once and use it "
                "twice inside fn, so that its two gradients are summed before the norm."
            )
        seen[id(leaf)] = name
    if not leaves:
        raise ValueError("params holds no tensor; there is nothing to differentiate.")
    return names


def _refuse_integers(name: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise ValueError(
            f"params: leaf {name!r} is {kind}; every leaf must be a floating-point tensor. Close over constants "
            "in fn instead."
        )


def _component(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
