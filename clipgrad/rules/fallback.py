"""What happens to an operation that no rule covers: it runs under ``vmap`` on per-sample copies, exactly.

A parameter's copy is an expanded leaf, so autograd itself materialises the per-sample gradient. Nothing has to be
written per operation, except where ``vmap`` deviates from the operation's own definition. Those places are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipgrad._foreign_code import node_of
from clipgrad._lanes import is_broadcast
from clipgrad.errors import NotPerSampleError
from clipgrad.rules._recurrent_definition import DEFINITIONS
from clipgrad.rules.loss import cross_entropy_by_definition


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``vmap`` forgets ``padding_idx`` and ``scale_grad_by_freq`` when the weight differs per sample."""
    refuse_max_norm(max_norm)
    rows = F.embedding(input, weight)
    if scale_grad_by_freq:
        count = (input.reshape(-1, 1) == input.reshape(1, -1)).sum(1).view(input.shape)
        fixed = rows.detach()
        rows = fixed + (rows - fixed) / count.unsqueeze(-1)  # the value stays, the gradient shrinks
    if padding_idx is None:
        return rows
    ignored = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(ignored, rows.detach(), rows)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Never sparse: the gradient meets dense ones."""
    refuse_max_norm(max_norm)
    return F.embedding_bag(
        input,
        weight,
        offsets,
        scale_grad_by_freq=scale_grad_by_freq,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )


def refuse_max_norm(max_norm: float | None) -> None:
    """Refuse the renormalisation of embedding rows in the forward pass."""
    if max_norm is not None:
        raise NotPerSampleError(
            f"embedding with max_norm={max_norm} rewrites rows of its weight in the forward pass, without noise and "
            "for all samples at once, which is not private. Set max_norm=None, or bound the norm inside the "
            "loss: F.embedding(ids, F.normalize(weight))."
        )


def _by_formula(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Fused kernels fail under ``vmap`` (a learned mask on CPU, alignment on CUDA); the formula does not."""

    def corrected(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*args, **kwargs)

    return corrected


def _not_left_aligned(*args: Any, **kwargs: Any) -> bool:
    """Asked by ``nn.TransformerEncoder`` in eval mode, on its way to a fused path that has no gradients."""
    return False


def _as_strided(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Its backward pass averages over what shares memory, so over samples where one copy stands for all."""
    if is_broadcast(input):
        raise NotPerSampleError(
            "as_strided is applied to a value that all samples share (a parameter, or rows looked up with ids that are "
            "the same for all), where PyTorch's gradient mixes samples. Use transpose, unfold, reshape or indexing."
        )
    return torch.as_strided(input, *args, **kwargs)


def _as_strided_copy(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _as_strided(input, *args, **kwargs).clone()


def _as_strided_in_place(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Under ``vmap`` its gradient is wrong even where no sample shares memory with another."""
    raise NotPerSampleError(
        "as_strided_ gives a tensor other strides in place, where PyTorch's gradient is wrong under vmap. Use "
        "transpose, unfold, reshape or indexing."
    )


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Under ``vmap`` the gradient of ``src`` comes once for each entry of the axis; that of a slice is right."""
    size = input.shape[dim]
    if not -size <= index < size:
        return torch.select_scatter(input, src, dim, index)  # which says so
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, index % size, index % size + 1)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """By its definition: in chunks it asks whether gradients are needed, and ``vmap`` answers that they are not."""
    return F.linear_cross_entropy(*args, **kwargs)


def _by_all_names(name: str, correction: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    """A correction for an operation and each of its aliases, those of ``torch.ops.aten`` included."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    public = [getattr(owner, name) for owner in (torch, Tensor) if hasattr(owner, name)]
    return dict.fromkeys([*public, packet, *overloads], correction)


def _layer_norm(layer_norm: Callable[..., Any]) -> Callable[..., Any]:
    """``vmap`` accepts a shape that reaches past a sample into the others; PyTorch itself would refuse it."""

    def corrected(input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        shape = tuple(normalized_shape)
        if len(shape) > input.dim():
            raise NotPerSampleError(
                f"layer_norm over normalized_shape={shape} reaches past one sample, whose input has shape "
                f"{tuple(input.shape)}. Normalise over axes of one sample."
            )
        return layer_norm(input, normalized_shape, *args, **kwargs)

    return corrected


def _register_hook(*args: Any, **kwargs: Any) -> None:
    raise NotPerSampleError(
        "the loss registers a hook on a tensor. A hook would see the gradients of all samples at once instead of one "
        "sample's. Change the value in the forward pass, or the gradients with pre_clipping_transform."
    )


CORRECTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType(
    {
        **DEFINITIONS,
        F.embedding: _embedding,
        F.cross_entropy: cross_entropy_by_definition,
        F.embedding_bag: _embedding_bag,
        F.scaled_dot_product_attention: _by_formula(F.scaled_dot_product_attention),
        F.multi_head_attention_forward: _by_formula(F.multi_head_attention_forward),
        F.layer_norm: _layer_norm(F.layer_norm),
        torch.layer_norm: _layer_norm(torch.layer_norm),
        torch._nested_tensor_from_mask_left_aligned: _not_left_aligned,
        **_by_all_names("as_strided", _as_strided),
        **_by_all_names("as_strided_copy", _as_strided_copy),
        **_by_all_names("as_strided_", _as_strided_in_place),
        **_by_all_names("select_scatter", _select_scatter),
        **(
            {F.linear_cross_entropy: _linear_cross_entropy}
            if hasattr(F, "linear_cross_entropy")
            else {}
        ),
        torch.Tensor.register_hook: _register_hook,
        torch.Tensor.grad_fn.__get__: node_of,  # type: ignore[union-attr]
    }
)
