"""Attention: equal outputs, and no road around the rules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention.bias import causal_lower_right

import clipgrad
from clipgrad import Performance
from clipgrad.rules.attention import multi_head_attention
from tests import oracle
from tests.rule_cases.attention import DOUBLE, draw, mha_params

HEADS, QUERIES, KEYS, SIZE = 2, 3, 5, 2
MASKS: dict[str, Callable[[int, int, int], Tensor] | None] = {
    "none": None,
    "bool": lambda rows, queries, keys: torch.ones(queries, keys, dtype=torch.bool).triu(2),
    "float": lambda rows, queries, keys: draw(queries, keys),
    "float_of_heads": lambda rows, queries, keys: draw(rows, queries, keys),
}
PADDINGS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,
    "bool": lambda *shape: torch.arange(shape[-1]).expand(shape) >= shape[-1] - 1,
    "float": lambda *shape: draw(*shape),
}
WEIGHTS: dict[str, dict[str, bool]] = {
    "no_weights": {"need_weights": False},
    "weights": {"need_weights": True},
    "weights_per_head": {"need_weights": True, "average_attn_weights": False},
}


def _arguments(inputs: str, bias: bool, bias_kv: bool, add_zero_attn: bool) -> tuple[Any, ...]:
    wide = inputs == "wide"
    p = mha_params(bias=bias, bias_kv=bias_kv, key_features=3 if wide else None)
    lead = () if inputs == "unbatched" else (SIZE,)
    query = draw(QUERIES, *lead, 4)
    key, value = draw(KEYS, *lead, 3 if wide else 4), draw(KEYS, *lead, 4)
    if inputs in ("self", "unbatched"):
        key = value = query
    if inputs == "memory":
        value = key
    separate = (wide, p.get("q_weight"), p.get("k_weight"), p.get("v_weight"))
    return (
        (query, key, value, 4, HEADS, p.get("in_weight"), p.get("in_bias"), p.get("bias_k")),
        (p.get("bias_v"), add_zero_attn, 0.0, p["out_weight"], p.get("out_bias")),
        separate,
    )


def _options(query: Tensor, key: Tensor, mask: str, padding: str) -> Iterator[dict[str, Any]]:
    size = query.shape[1] if query.dim() == 3 else 1
    make_mask, make_padding = MASKS[mask], PADDINGS[padding]
    lead = query.shape[1:-1]
    options: dict[str, Any] = {}
    if make_mask is not None:
        options["attn_mask"] = make_mask(size * HEADS, query.shape[0], key.shape[0])
    if make_padding is not None:
        options["key_padding_mask"] = make_padding(*lead, key.shape[0])
    yield options
    if make_mask is not None:
        yield {**options, "is_causal": True}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("inputs", ["self", "memory", "other", "wide", "unbatched"])
def test_outputs_equal_those_of_pytorch(inputs: str, mask: str, padding: str, weights: str) -> None:
    torch.manual_seed(0)
    for bias, bias_kv, zero in itertools.product((False, True), repeat=3):
        first, second, separate = _arguments(inputs, bias, bias_kv, zero)
        for options in _options(first[0], first[1], mask, padding):
            names = ("use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            options |= dict(zip(names, separate, strict=True)) | WEIGHTS[weights]
            expected, seen = F.multi_head_attention_forward(*first, *second, **options)
            output, weights_seen = multi_head_attention(*first, *second, **options)
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
            assert (weights_seen is None) == (seen is None)
            if seen is not None:
                torch.testing.assert_close(weights_seen, seen, rtol=0, atol=1e-12)


def test_static_keys_and_values() -> None:
    torch.manual_seed(0)
    first, second, _ = _arguments("memory", True, False, True)
    static = {"static_k": draw(SIZE * HEADS, KEYS, 2), "static_v": draw(SIZE * HEADS, KEYS, 2)}
    expected, seen = F.multi_head_attention_forward(*first, *second, **static)
    output, weights = multi_head_attention(*first, *second, **static)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, seen, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.zeros(QUERIES, KEYS + 1, dtype=DOUBLE)},
        {"attn_mask": torch.zeros(3, QUERIES, KEYS, dtype=DOUBLE)},
        {"attn_mask": torch.zeros(QUERIES, KEYS, dtype=torch.long)},
        {"key_padding_mask": torch.zeros(SIZE + 1, KEYS, dtype=torch.bool)},
        {"is_causal": True},
    ],
)
def test_what_pytorch_refuses_is_its_own_error(options: dict[str, Any]) -> None:
    first, second, _ = _arguments("memory", True, False, False)
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        F.multi_head_attention_forward(*first, *second, **options)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        multi_head_attention(*first, *second, **options)


# ------------------------------------------------------------------------------------- modules


class Attend(nn.Module):
    """``nn.MultiheadAttention`` on one or two sequences."""

    def __init__(self, memory: bool = False, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, HEADS, batch_first=True, **options)
        self.memory = memory
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1).sin() if self.memory else x
        y: Tensor = self.attention(x, other, other, need_weights=self.need_weights)[0]
        return y


class Sequences(nn.Module):
    """An encoder or an encoder layer."""

    def __init__(self, make: Callable[[nn.Module], nn.Module], **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, HEADS, 6, 0.0, batch_first=True, **options)
        self.body = make(layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


class Padded(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros_like(x[..., 0], dtype=torch.bool)
        padding[:, -1] = True
        y: Tensor = self.body(x, src_key_padding_mask=padding)
        return y


class Decode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, HEADS, 6, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y: Tensor = self.layer(x, x.flip(1).cos(), tgt_mask=hidden, tgt_is_causal=True)
        return y


MODULES: dict[str, Callable[[], nn.Module]] = {
    "self_attention": Attend,
    "with_weights": lambda: Attend(need_weights=True),
    "memory": lambda: Attend(memory=True),
    "memory_widths": lambda: Attend(memory=True, kdim=4, vdim=4),
    "bias_kv": lambda: Attend(add_bias_kv=True, add_zero_attn=True),
    "encoder_layer": lambda: Sequences(lambda layer: layer),
    "encoder_layer_norm_first": lambda: Sequences(lambda layer: layer, norm_first=True),
    "encoder": lambda: Sequences(lambda layer: nn.TransformerEncoder(layer, 2)),
    "padded_encoder": lambda: Padded(lambda layer: nn.TransformerEncoder(layer, 2)),
    "decoder_layer": Decode,
}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return (y.sin() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def _functional(
    model: nn.Module, loss: Callable[..., Tensor] = _loss
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    def run(params: dict[str, Tensor], *batch: Any) -> Tensor:
        return loss(lambda *args: functional_call(model, params, args), *batch)  # type: ignore[arg-type]

    return run, {name: p for name, p in model.named_parameters() if p.requires_grad}


# nn.TransformerEncoder warns when it is made that its nested tensors won't be used.
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_take_the_rules(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = MODULES[name]().double().train(training)
    x = draw(4, 3, 4)
    loss, params = _functional(model)
    gradient = clipgrad.clipped_grad(loss, max_grad_norm=1.0)
    result = gradient(params, x)
    expected, norms = oracle.clipped_sum(oracle.per_sample_gradients(model, _loss, (x,)), 1.0)
    torch.testing.assert_close(result.grads, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.grad_norms, norms, rtol=0, atol=1e-9)
    slow = [p for p in gradient.explain(params, x).fallbacks if "norm" not in p]
    assert [p for p in slow if not p.endswith(("(attention.bias_k)", "(attention.bias_v)"))] == []


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", ["encoder", "padded_encoder"])
def test_frozen_encoder_in_eval_mode(name: str) -> None:
    """Nothing in it requires grad: PyTorch would take its fused inference path."""
    torch.manual_seed(0)
    encoder = MODULES[name]().eval().requires_grad_(False)
    model = nn.Sequential(encoder, nn.Linear(4, 4)).double()
    x = draw(4, 3, 4)
    loss, params = _functional(model)
    result = clipgrad.clipped_grad(loss, max_grad_norm=1.0)(params, x)
    encoder.train()  # the oracle itself would take that path, which zeroes padded positions
    expected, norms = oracle.clipped_sum(oracle.per_sample_gradients(model, _loss, (x,)), 1.0)
    torch.testing.assert_close(result.grads, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.grad_norms, norms, rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------- dropout


def _dropped(params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x * params["gain"]
    y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    return y.sum(), y


def test_dropout_differs_between_samples() -> None:
    params, x = {"gain": torch.ones((), dtype=DOUBLE)}, draw(1, HEADS, 8, 4).expand(3, -1, -1, -1)
    y = clipgrad.clipped_grad(_dropped, max_grad_norm=1.0, has_aux=True)(params, x).aux
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[1], y[2])


def test_dropout_obeys_randomness() -> None:
    params, x = {"gain": torch.ones((), dtype=DOUBLE)}, draw(1, HEADS, 8, 4).expand(3, -1, -1, -1)
    same = clipgrad.clipped_grad(
        _dropped, max_grad_norm=1.0, has_aux=True, performance=Performance(randomness="same")
    )
    y = same(params, x).aux
    torch.testing.assert_close(y[0], y[1])
    never = clipgrad.clipped_grad(
        _dropped, max_grad_norm=1.0, has_aux=True, performance=Performance(randomness="error")
    )
    with pytest.raises(clipgrad.errors.NotPerSampleError, match="random"):
        never(params, x)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_multi_head_attention(need_weights: bool) -> None:
    """Dropout acts in training, by default as well, and differs between samples."""

    def loss(p: dict[str, Tensor], x: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        y, _ = F.multi_head_attention_forward(
            x[0], x[0], x[0], 4, 2, p["in"], None, None, None, False, 0.5, p["out"], None,
            need_weights=need_weights, **options,
        )  # fmt: skip
        return y.sum(), y

    params = {"in": draw(12, 4), "out": draw(4, 4)}
    x = draw(1, 8, 1, 4).expand(3, -1, -1, -1)
    transform = clipgrad.clipped_grad(loss, max_grad_norm=1.0, has_aux=True)
    y = transform(params, x).aux
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[1], y[2])
    evaluated = clipgrad.clipped_grad(
        lambda p, x: loss(p, x, training=False), max_grad_norm=1.0, has_aux=True
    )
    y = evaluated(params, x).aux
    torch.testing.assert_close(y[0], y[1])


def test_mask_of_another_type() -> None:
    """``CausalBias`` has an implementation of its own, which the exact fallback calls."""

    def loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        q, k, v = model(x).chunk(3, -1)
        bias = causal_lower_right(QUERIES, QUERIES)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sin().sum()

    torch.manual_seed(0)
    model, x = nn.Linear(4, 12).double(), draw(4, HEADS, QUERIES, 4)
    run, params = _functional(model, loss)
    result = clipgrad.clipped_grad(run, max_grad_norm=1.0)(params, x)
    expected, _ = oracle.clipped_sum(oracle.per_sample_gradients(model, loss, (x,)), 1.0)
    torch.testing.assert_close(result.grads, expected, rtol=0, atol=1e-9)
