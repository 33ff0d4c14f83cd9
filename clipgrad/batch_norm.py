"""Replace batch normalisation, which has no per-sample gradient, by group normalisation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from clipgrad.errors import NotPerSampleError

# He and Wu's default (arXiv:1803.08494, section 4.1), also the usual choice in differentially private training.
_MOST_GROUPS = 32
# A group of one channel is an instance norm, which removes every channel's mean, and on vectors all information.
_CHANNELS_OF_IMAGES = 2
# Vectors have no positions to average over: standardising two values together keeps only which value is larger.
_CHANNELS_OF_VECTORS = 8

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def replace_batch_norm(model: nn.Module, *, num_groups: int | None = None) -> nn.Module:
    """Replace every ``BatchNorm1d/2d/3d`` and ``SyncBatchNorm`` by a ``GroupNorm``, in place.

    Batch norm mixes the samples of a batch, so one sample's gradient depends on other samples; group norm computes its
    statistics within one sample. The new layer keeps the same weight and bias parameters (so ties and existing
    optimizers stay valid), ``eps``, and train or eval mode. It does not keep running statistics and hooks, so a trained
    model needs training again. A layer that is used in several places stays one layer.

    Args:
        model: The model, which is changed in place, unless it is itself a batch norm: use the returned module.
        num_groups: Number of groups of every new layer; it must divide the layer's channels. By default each layer gets
            the largest divisor of its channels up to 32 that leaves at least 2 channels in a group (8 for
            ``BatchNorm1d``, whose input may have no positions to average over), or otherwise 1.

    Returns:
        The model.

    Raises:
        ValueError: If ``num_groups`` does not divide a layer's channels, or a layer cannot be replaced.

    Examples:
        >>> from torch import nn
        >>> from clipgrad.batch_norm import replace_batch_norm
        >>> replace_batch_norm(nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24)))
        Sequential(
          (0): Conv2d(3, 24, kernel_size=(3, 3), stride=(1, 1))
          (1): GroupNorm(12, 24, eps=1e-05, affine=True...)
        )
    """
    if num_groups is not None and (type(num_groups) is not int or num_groups < 1):
        raise ValueError(
            f"num_groups must be a positive integer, or None for a divisor of each layer's channels, got "
            f"{num_groups!r}."
        )
    # Make all replacements before inserting the first, so that an error leaves the model unchanged.
    replacements = {
        layer: _group_norm(layer, num_groups, name) for layer, name in _batch_norms(model)
    }
    if isinstance(model, _BatchNorm):
        return replacements[model]
    for parent in list(model.modules()):
        for (
            name,
            child,
        ) in parent._modules.items():  # named_children() would skip repeated children
            if isinstance(child, _BatchNorm):
                parent._modules[name] = replacements[child]
    return model


def _batch_norms(model: nn.Module) -> Iterator[tuple[_BatchNorm, str]]:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield module, name


def _group_norm(layer: _BatchNorm, num_groups: int | None, name: str) -> nn.GroupNorm:
    _check_replaceable(layer, name)
    channels = layer.num_features
    groups = _default_groups(layer) if num_groups is None else num_groups
    if channels % groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide the {channels} channels of layer {name!r}; leave num_groups out "
            "to have a divisor chosen for every layer."
        )
    # affine=False, since the layer's own parameters are used.
    replacement = nn.GroupNorm(groups, channels, eps=layer.eps, affine=False)
    replacement.affine = layer.affine
    replacement.weight, replacement.bias = layer.weight, layer.bias
    return replacement.train(layer.training)


def _check_replaceable(layer: _BatchNorm, name: str) -> None:
    kind = type(layer).__name__
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(
            f"layer {name!r} is a {kind} that does not know its number of channels yet; run one batch through the "
            "model first, or make it with num_features."
        )
    if type(layer).forward not in _FORWARDS or parametrize.is_parametrized(layer):
        reason = "is parametrized" if parametrize.is_parametrized(layer) else "has its own forward"
        raise ValueError(
            f"layer {name!r} is a {kind}, a batch norm that {reason}, which a GroupNorm would drop; replace it by hand "
            "before you call replace_batch_norm."
        )


def _default_groups(layer: _BatchNorm) -> int:
    channels = layer.num_features
    least = _CHANNELS_OF_VECTORS if isinstance(layer, nn.BatchNorm1d) else _CHANNELS_OF_IMAGES
    most = min(_MOST_GROUPS, channels // least)
    return next((groups for groups in range(most, 1, -1) if channels % groups == 0), 1)


def batch_norm_error(state: str, *, trained: bool = True) -> NotPerSampleError:
    """Return the error for a BatchNorm layer that normalises samples together.

    Args:
        state: What makes it do so, ``"in training mode"`` for example.
        trained: Whether the layer may have running statistics that eval mode would use.
    """
    otherwise = ", or, if its running statistics are trained already, fix them with model.eval()"
    return NotPerSampleError(
        f"BatchNorm {state} normalises every sample by the mean and variance of the whole batch, so the gradient of "
        "one sample depends on the others and cannot be clipped on its own. Replace it by GroupNorm with "
        f"clipgrad.replace_batch_norm(model){otherwise if trained else ''}."
    )


__all__ = ["batch_norm_error", "replace_batch_norm"]
