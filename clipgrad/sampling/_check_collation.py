"""Check that a batch is made of samples that do not see each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from clipgrad.sampling._collate import is_text


def check_collation(
    loss_fn: Callable[..., Any],
    model: nn.Module,
    samples: Sequence[Any],
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    *,
    keep_batch_dim: bool = True,
    tolerance: float = 1e-3,
) -> None:
    """Refuse a ``collate_fn`` that lets one sample of a batch change the gradient of another.

    Clipping bounds what a sample's own gradient adds to the sum, not what the sample does to the rows of others. If
    rows are padded to the longest one, a long sample may do so: where padding has no mask, or where padding on the left
    moves the positions. Each sample is collated alone and together with the others, and its two gradients are compared.
    The model is in eval mode meanwhile, and nothing is changed.

    Args:
        loss_fn: The loss, as for ``DPOptimizer``.
        model: The model.
        samples: At least two samples that differ in length: ``[dataset[i] for i in range(8)]``.
        collate_fn: The function that the loader gets.
        keep_batch_dim: As for ``DPOptimizer``.
        tolerance: Largest difference, relative to the norm of the gradient; padding changes rounding.

    Raises:
        ValueError: If a gradient differs; the message names the sample and the difference.

    Examples:
        >>> import torch
        >>> from torch.nn.utils.rnn import pad_sequence
        >>> rows = [torch.ones(2, 1), torch.ones(5, 1)]
        >>> def collate(rows):
        ...     return pad_sequence(rows, batch_first=True)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> check_collation(lambda model, x: model(x).sum(), model, rows, collate)
        >>> check_collation(lambda model, x: model(x).mean(), model, rows, collate)
        Traceback (most recent call last):
        ...
        ValueError: sample 0 has another gradient in a batch of 2 samples than alone: they differ by 0.6 of its norm...
    """
    if len(samples) < 2:
        raise ValueError(f"samples must be at least two samples, got {len(samples)}.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient(batch: Any, row: int) -> list[Tensor]:
        index: Any = slice(row, row + 1) if keep_batch_dim else row
        place = trained[0].device
        one = tree_map(
            lambda leaf: leaf[index].to(place) if isinstance(leaf, Tensor) else leaf, batch
        )
        loss = _call(loss_fn, model, one)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return list(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))

    with evaluating(model):
        together = _plain(collate_fn(list(samples)))
        for index, sample in enumerate(samples):
            alone = gradient(_plain(collate_fn([sample])), 0)
            difference = [a - b for a, b in zip(gradient(together, index), alone, strict=True)]
            error, norm = _norm(difference), _norm(alone)
            if not error <= tolerance * norm:  # NaN is refused too
                share = f"{error / norm:.1g} of its norm" if norm else f"{error:.1g}"
                raise ValueError(
                    f"sample {index} has another gradient in a batch of {len(samples)} samples than alone: they differ "
                    f"by {share}. The others change its row, which clipping does not bound, so no epsilon holds. If "
                    "rows are padded to the longest one, pad on the right and pass the mask, or pad to a fixed length."
                )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the body with the model in eval mode, and give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _call(loss_fn: Callable[..., Any], model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return loss_fn(model, **batch)
    return loss_fn(model, *batch) if isinstance(batch, tuple | list) else loss_fn(model, batch)


def _plain(batch: Any) -> Any:
    """Return a mapping as a dictionary without columns of strings, as ``backward`` does."""
    if not isinstance(batch, Mapping):
        return batch
    return {name: column for name, column in batch.items() if not is_text(column)}


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())
