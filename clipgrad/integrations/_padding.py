"""Refuse a loss that depends on how far a sample is padded: the longest sample of a batch would change all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipgrad.sampling._check_collation import evaluating

_SAMPLES = 8  # that are tried for two lengths


def refuse_influence_of_padding(
    loss_fn: Callable[[nn.Module, Any], Any],
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    tolerance: float,
) -> None:
    """Compare the loss of a sample alone with its loss when it is padded to the length of another sample.

    The model runs in evaluation mode. The function does nothing if there are no two lengths, if collating is random, or
    if the model refuses a batch of one.

    Args:
        loss_fn: The loss of a model and a batch of one.
        model: The model.
        dataset: A map-style dataset.
        collate: Makes a batch of samples.
        tolerance: Largest relative difference of two equal losses.

    Raises:
        ValueError: If the two losses differ.
    """
    with evaluating(model), torch.random.fork_rng(devices=()), torch.no_grad():
        try:
            found = _pair(dataset, collate)
            if found is None:
                return
            losses = [float(_loss_of(loss_fn(model, _on(model, batch)))) for batch in found]
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            return  # what is wrong here is wrong in training too, and has its own message there
    alone, padded = losses
    if abs(alone - padded) > tolerance * max(abs(alone), abs(padded)):
        raise ValueError(
            "the loss of a sample changes if the sample is padded to the length of another one. So the longest sample "
            "of a batch changes the gradients of all others, which clipping does not bound. Set labels of padding to "
            "-100, give the model an attention_mask, and pad on the right; or pad all samples to one length "
            "(padding='max_length')."
        )


def _pair(
    dataset: Any, collate: Callable[[list[Any]], Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return a batch of one sample, and the same sample as it is padded beside a longer one; None if there is none."""
    count = len(dataset)
    samples = [dataset[number * count // _SAMPLES] for number in range(min(_SAMPLES, count))]
    alone = [collate([dict(sample)]) for sample in samples]
    sizes = [sum(leaf.numel() for leaf in _tensors(batch).values()) for batch in alone]
    short, long = sizes.index(min(sizes)), sizes.index(max(sizes))
    both = collate([dict(samples[short]), dict(samples[long])])
    padded = {n: v[:1] if isinstance(v, Tensor) else v for n, v in dict(both).items()}
    again, batch = _tensors(collate([dict(samples[short])])), _tensors(alone[short])
    repeats = all(torch.equal(batch[name], leaf) for name, leaf in again.items())
    grew = any(batch[name].shape != leaf.shape for name, leaf in _tensors(padded).items())
    return (alone[short], padded) if repeats and grew else None


def _tensors(batch: Any) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in dict(batch).items() if isinstance(leaf, Tensor)}


def _on(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in dict(batch).items()}


def _loss_of(returned: Any) -> Any:
    return returned[0] if isinstance(returned, tuple) else returned
