"""This module flattens the arguments of a loss: parameters with names, leaves of the batch, and their structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import MappingKey, keystr, tree_leaves

from clipgrad import _validate
from clipgrad.engine.error_messages import note_arguments
from clipgrad.engine.flat_tree import TENSORS, FlatTree, Restore, flatten
from clipgrad.engine.foreign_code import refuse_subclasses
from clipgrad.engine.whole_tensors import WholeTensors, by_id


def copy_samples(batch: Sequence[Any]) -> list[Any]:
    """Return a copy of a flat batch; constants are not copied."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in batch]


Loss = Callable[[Sequence[Tensor], Sequence[Any]], Any]
"""A function from the leaves of the parameters and of one sample to the result of the user's function."""


class SampleCall(NamedTuple):
    """This tuple describes how to call the user's function on one sample, so that PyTorch can capture it.

    Attributes:
        fn: The user's function.
        arguments: A function from the leaves of one sample to the arguments of ``fn``.
        parameters: The parameters that ``fn`` reads; each requires grad.
        context: A context manager in which ``fn`` must run.
    """

    fn: Callable[..., Any]
    arguments: Callable[[Sequence[Any]], tuple[Any, ...]]
    parameters: list[Tensor]
    context: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Inputs:
    """This class holds the arguments of one call as lists of leaves, the form that the engine uses.

    Attributes:
        names: Names of the parameters.
        params: The parameters.
        batch: Leaves of the batch: tensors with a leading batch axis, and constants.
        batch_size: Number of samples.
        loss: A function from the parameters' leaves and one sample's leaves to the result of the user's function.
        sample_call: A function that returns how to call the same function on one sample.
        whole: The tensors of the whole batch that the caller holds, which the loss must not read.
    """

    names: list[str]
    params: list[Tensor]
    batch: list[Any]
    batch_size: int
    loss: Loss
    sample_call: Callable[[], SampleCall]
    whole: WholeTensors = field(default_factory=dict)

    def rows(self, index: slice) -> list[Any]:
        """Return the leaves of some of the samples."""
        whole = index.start == 0 and index.stop == self.batch_size
        if whole:
            return list(self.batch)
        return [leaf[index] if isinstance(leaf, Tensor) else leaf for leaf in self.batch]


def inputs_of_model(
    loss_fn: Callable[..., Any],
    model: nn.Module,
    names: list[str],
    params: list[Tensor],
    holding: Callable[[Sequence[Tensor]], AbstractContextManager[None]],
    batch: tuple[Any, ...],
    call: str,
    handed_out: Sequence[Tensor] = (),
) -> Inputs:
    """Return the inputs of ``loss_fn(model, *batch)``.

    Args:
        loss_fn: The loss.
        model: The model that holds the parameters.
        names: Names of the parameters.
        params: The parameters, each once.
        holding: A context manager that replaces the parameters by other tensors.
        batch: Pytrees of tensors.
        call: The user's call, for an error about arguments that do not fit.
        handed_out: Further tensors of whole batches, which the loss must not read.

    Raises:
        ValueError: If the batch or a parameter cannot be clipped per sample.
    """
    _check_parameters(params, lambda: [(MappingKey(name),) for name in names])
    for name, param in zip(names, params, strict=True):
        _refuse_integers(name, param)
    if not batch:
        raise ValueError(
            "backward needs the batch, as loss_fn takes it after the model; it computes the loss itself."
        )
    samples = flatten(batch)
    for leaf in samples.leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ValueError(
                f"the batch holds a tensor of shape {tuple(leaf.shape)} that requires grad, but no gradient flows "
                "through the batch. Compute it inside loss_fn, or detach it if nothing before it is trained."
            )
    leaves, size = _checked_batch(samples, batch, params)

    def loss(parameters: Sequence[Tensor], sample: Sequence[Any]) -> Any:
        given = (model, *samples.restore(sample))
        with holding(parameters):
            return _called(loss_fn, given, call)

    def sample_call() -> SampleCall:
        return SampleCall(
            loss_fn,
            lambda sample: (model, *samples.restore(sample)),
            params,
            lambda: holding(params),
        )

    whole = by_id([*samples.leaves, *handed_out])
    return Inputs(names, params, leaves, size, loss, sample_call, whole)


def inputs_of_arguments(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...],
    batch_argnums: tuple[int, ...] | None,
    args: tuple[Any, ...],
) -> tuple[Inputs, Restore]:
    """Return the inputs of ``fn(*args)``, and the function from leaves to the parameters' structure.

    Args:
        fn: The loss.
        argnums: Positions of the parameters.
        batch_argnums: Positions of the batch; None for all other arguments.
        args: The arguments.

    Raises:
        ValueError: If the arguments do not fit together.
    """
    single = isinstance(argnums, int)
    argnums = (argnums,) if isinstance(argnums, int) else argnums
    argnums, batch_argnums = _validate.argument_positions(argnums, batch_argnums, len(args))
    trainable = tuple(args[i] for i in argnums)
    parameters = flatten(trainable[0] if single else trainable)
    _check_parameters(parameters.leaves, parameters.paths)
    names = _parameter_names(parameters)
    trees = tuple(args[i] for i in batch_argnums)
    samples = flatten(trees)
    batch, size = _checked_batch(samples, trees, parameters.leaves)
    used = {*argnums, *batch_argnums}
    rest = [args[i] for i in range(len(args)) if i not in used]
    refuse_subclasses(tree_leaves(rest), "an argument of the loss")

    def full(leaves: Sequence[Tensor], sample: Sequence[Any]) -> list[Any]:
        """Return the arguments of ``fn`` with other parameters and samples."""
        full = list(args)
        restored = parameters.restore(leaves)
        for position, value in zip(argnums, (restored,) if single else restored, strict=True):
            full[position] = value
        for position, value in zip(batch_argnums, samples.restore(sample), strict=True):
            full[position] = value
        return full

    def loss(leaves: Sequence[Tensor], sample: Sequence[Any]) -> Any:
        return _called(fn, full(leaves, sample), "gradient(params, *batch)")

    def sample_call() -> SampleCall:
        usual = [p.requires_grad and p.is_leaf for p in parameters.leaves]
        trained = [
            p if is_usual else p.detach().requires_grad_()
            for p, is_usual in zip(parameters.leaves, usual, strict=True)
        ]
        return SampleCall(fn, lambda sample: tuple(full(trained, sample)), trained, nullcontext)

    whole = by_id(samples.leaves)
    found = Inputs(names, parameters.leaves, batch, size, loss, sample_call, whole)
    return found, parameters.restore


def _called(fn: Callable[..., Any], given: Sequence[Any], call: str) -> Any:
    """The value of the user's function; arguments that do not fit are explained by the right ``call``."""
    try:
        return fn(*given)
    except TypeError as error:
        note_arguments(error, fn, given, call)
        raise


def _check_parameters(params: Sequence[Any], paths: Callable[[], list[tuple[Any, ...]]]) -> None:
    _validate.require_dense("params", params, paths)
    refuse_subclasses(params, "a parameter")


def _checked_batch(
    samples: FlatTree, trees: Sequence[Any], params: Sequence[Tensor]
) -> tuple[list[Any], int]:
    """Return the detached leaves of a batch, and the number of samples."""
    refuse_subclasses(samples.leaves, "the batch")
    batch = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in samples.leaves]
    _validate.require_dense("batch", batch, samples.paths)

    size = _validate.batch_size(batch, lambda: list(map(keystr, samples.paths())))
    _validate.require_differentiable(params, batch)
    _validate.refuse_python_samples(trees, size)
    return batch, size


def _parameter_names(parameters: FlatTree) -> list[str]:
    """Return the name of each parameter, and refuse parameters that cannot be differentiated."""
    leaves, names = parameters.leaves, parameters.names()
    usual = bool(leaves) and TENSORS.issuperset(map(type, leaves))
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
