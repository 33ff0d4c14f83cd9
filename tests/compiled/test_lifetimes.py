"""What a compiled step holds, and for how long."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgrad
from clipgrad import Performance


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_weight_gradients_do_not_wait_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every activation and every gradient would live until there."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering  # it takes seconds to import, and runs at night

    written: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(written.append))

    def deep(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for name in params:
            x = F.linear(x, params[name]).sigmoid()
        return x.square().sum()

    layers = 5
    weights = {f"{layer}": torch.randn(64, 64) / 8 for layer in range(layers)}
    gradient = clipgrad.clipped_grad(
        deep, max_grad_norm=1.0, performance=Performance(strategy="kept"), compile=True
    )
    with config.patch(fx_graph_cache=False):  # else there may be no code to write
        gradient(weights, torch.randn(4, 16, 64))
    products = re.findall(r"extern_kernels\.(mm|bmm)\(", written[0])
    forward = ["mm"] * layers
    # Each layer's product of samples comes before the gradient of the layer below it; the first layer has none.
    assert products == forward + ["bmm", "mm"] * (layers - 1) + ["bmm"]
