"""A convolution's image in a graph for any number of rows: unfolded by the graph, or by one operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, Performance
from clipgrad.rules.convolution import gradient as gradient_module
from clipgrad.rules.convolution import methods, unfolding
from tests.compiled.conftest import Graphs
from tests.nightly import some
from tests.oracle import clipped_sum, per_sample_gradients

SIZES = (6, 11, 2, 1, 9, 4)
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": (2, 1)},
    "strided": {"stride": (1, 2), "padding": (0, 1)},
    "dilated": {"dilation": (2, 1), "padding": 1},
    "transposed": {"transposed": True},
    "transposed_strided": {"transposed": True, "stride": (1, 2), "output_padding": (0, 1)},
}


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).tanh().square().mean()


@pytest.mark.parametrize(
    ("name", "layout", "way", "parts"),
    some(
        3,
        list(CONVOLUTIONS),
        [torch.contiguous_format, torch.channels_last],
        [methods.by_patches, methods.by_slices],
        [1, 2, 3, 5],
    ),
)
def test_every_number_of_rows(
    name: str,
    layout: torch.memory_format,
    way: methods.Method,
    parts: int,
    graphs: Graphs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = dict(CONVOLUTIONS[name])
    layer = nn.ConvTranspose2d if options.pop("transposed", False) else nn.Conv2d
    model = layer(3, 4, (3, 2), **options).double()
    monkeypatch.setattr(gradient_module, "fastest_method", lambda *_: way)
    monkeypatch.setattr(methods, "_SLICES_BY_COMPILERS", {"cpu": 1})
    for module in (methods, unfolding):
        monkeypatch.setattr(module, "number_of_parts", lambda image, copies: parts)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=0.01, noise_multiplier=0.0,
        expected_batch_size=6, compile=True, performance=Performance(strategy="kept"),
    )  # fmt: skip
    for size in SIZES:
        x = torch.randn(size, 3, 8, 7, dtype=torch.float64).contiguous(memory_format=layout)
        optimizer.backward(x)
        sums, norms = clipped_sum(per_sample_gradients(model, loss_fn, (x,)), 0.01)
        torch.testing.assert_close(optimizer.clipped_sums, sums)
        torch.testing.assert_close(optimizer.diagnostics.grad_norms, norms)
        optimizer.zero_grad()
    (step,) = graphs.modules
    targets = [str(node.target) for node in step.graph.nodes]
    by_compiler = parts <= (4 if way is methods.by_patches else 1)
    assert ("clipgrad.per_sample_weight_gradient.default" in targets) is not by_compiler
    if way is methods.by_slices:
        assert ("clipgrad.window_products.default" in targets) is by_compiler


@pytest.mark.parametrize(("samples", "parts"), [(1, 1), (5, 4), (8, 4), (9, 2), (100, 7), (3, 3)])
def test_pieces_are_all_samples_once(
    samples: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfolding, "number_of_parts", lambda image, copies: parts)
    rows = torch.arange(samples)
    found = [rows[piece] for piece in unfolding.pieces(rows, 1)]
    assert torch.equal(torch.cat(found), rows)
    assert len(found) <= parts
    assert all(len(piece) == len(found[0]) for piece in found[:-1])
    assert len(found[-1]) > 0
