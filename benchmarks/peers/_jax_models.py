"""JAX twins of workloads: the same mathematics, from the weights of the PyTorch model. No torch in here.

A model is described by a specification (see ``jax_privacy.py``); parameters are a flat dictionary by PyTorch's names.
Images have their channels last and convolution kernels are [height, width, in, out], as is usual in JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = Any
Params = dict[str, Array]
Spec = dict[str, Any]


def loss_of(spec: Spec) -> Callable[..., Array]:
    """``loss(params, *batch)``, the mean over the batch."""
    return {"cnn": _cnn_loss, "transformer": _transformer_loss}[spec["kind"]](spec)


def params_from_torch(spec: Spec, weights: Params) -> Params:
    return {name: _converted(spec, name, value, back=False) for name, value in weights.items()}


def params_to_torch(spec: Spec, params: Params) -> Params:
    return {name: _converted(spec, name, np.asarray(p), back=True) for name, p in params.items()}


def batch_from_torch(spec: Spec, batch: Sequence[Array]) -> list[Array]:
    if spec["kind"] == "cnn":
        images, labels = batch
        return [np.moveaxis(images, 1, -1), labels.astype(np.int32)]
    return [batch[0].astype(np.int32)]


def _converted(spec: Spec, name: str, value: Array, *, back: bool) -> Array:
    """One parameter, or the gradient of one, from PyTorch's layout into JAX's or back."""
    layer = next(
        (one for one in spec.get("layers", ()) if name == f"{one.get('name')}.weight"), None
    )
    if layer is None:
        return value
    if layer["kind"] == "conv":
        return value.transpose(3, 2, 0, 1) if back else value.transpose(2, 3, 1, 0)
    if layer["kind"] == "linear":
        value = value.T if back else value
        if shape := layer.get(
            "flattened"
        ):  # what it reads was flattened from [C, H, W] there, from [H, W, C] here
            channels, height, width = shape
            there, here = (channels, height, width), (height, width, channels)
            axes = (0, 3, 1, 2) if back else (0, 2, 3, 1)
            split = value.reshape(len(value), *(here if back else there))
            value = split.transpose(axes).reshape(len(value), -1)
        return value if back else value.T
    return value


def _cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _cnn_loss(spec: Spec) -> Callable[..., Array]:
    def loss(params: Params, x: Array, labels: Array) -> Array:
        for layer in spec["layers"]:
            x = _cnn_layer(layer, params, x)
        return _cross_entropy(x, labels)

    return loss


def _cnn_layer(layer: Spec, params: Params, x: Array) -> Array:
    kind = layer["kind"]
    if kind == "relu":
        return jax.nn.relu(x)
    if kind == "flatten":
        return x.reshape(len(x), -1)
    if kind == "pool":
        # On a CPU the step takes a third less time than with reduce_window and the gradient that it has.
        n, height, width, channels = x.shape
        size = layer["size"]
        windows = x.reshape(n, height // size, size, width // size, size, channels)
        return windows.max((2, 4))
    weight, bias = params[f"{layer['name']}.weight"], params[f"{layer['name']}.bias"]
    if kind == "linear":
        return x @ weight + bias
    margin = layer["padding"]
    convolved = jax.lax.conv_general_dilated(
        x, weight, (1, 1), [(margin, margin)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return convolved + bias


def _transformer_loss(spec: Spec) -> Callable[..., Array]:
    def loss(params: Params, ids: Array) -> Array:
        x = params["tokens.weight"][ids[:, :-1]] + params["positions"]
        for index in range(spec["layers_in_all"]):
            x = _block(params, f"blocks.{index}", x, spec["heads"])
        logits = _norm(params, "norm", x) @ params["head.weight"].T
        return _cross_entropy(logits, ids[:, 1:])

    return loss


def _block(params: Params, at: str, x: Array, heads: int) -> Array:
    n, t, d = x.shape
    qkv = _linear(params, f"{at}.qkv", _norm(params, f"{at}.norm_1", x))
    q, k, v = jnp.unstack(qkv.reshape(n, t, 3, heads, d // heads), axis=2)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + _linear(params, f"{at}.out", attended.reshape(n, t, d))
    h = _linear(params, f"{at}.up", _norm(params, f"{at}.norm_2", x))
    return x + _linear(params, f"{at}.down", jax.nn.gelu(h, approximate=False))


def _linear(params: Params, at: str, x: Array) -> Array:
    return x @ params[f"{at}.weight"].T + params[f"{at}.bias"]


def _norm(params: Params, at: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params[f"{at}.weight"] + params[f"{at}.bias"]
