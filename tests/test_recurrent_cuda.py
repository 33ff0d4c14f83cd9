"""Recurrent layers on a GPU: through cuDNN and through the loop, against the CPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import clipgrad
from clipgrad import Performance
from clipgrad.rules.recurrent import cudnn as cudnn_module
from tests.rule_cases.recurrent import DOUBLE, draw, flatten, score

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def clipped(
    model: nn.Module, x: Tensor, device: str, **options: Any
) -> clipgrad.result.ClippedGradResult:
    model, x = model.to(device), x.to(device)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return score(*(part.cpu() for part in flatten(functional_call(model, params, (x,)))))

    transform = clipgrad.clipped_grad(loss, max_grad_norm=0.5, **options)
    return transform(dict(model.named_parameters()), x)


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (nn.LSTM, {}),
        (nn.GRU, {}),
        (nn.RNN, {"nonlinearity": "tanh"}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
)
def test_cuda_equals_cpu(
    kind: type[nn.RNNBase],
    more: dict[str, str],
    bias: bool,
    cudnn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = kind(3, 4, 2, bidirectional=True, batch_first=True, bias=bias, dtype=DOUBLE, **more)
    x = draw(5, 12, 3)
    taken = []
    plain = cudnn_module.run
    monkeypatch.setattr(cudnn_module, "run", lambda *args: (taken.append(1), plain(*args))[1])
    expected = clipped(model, x, "cpu")
    assert not taken
    with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False):
        for strategy in ("kept", "ghost"):
            result = clipped(
                model, x, "cuda", performance=Performance(strategy=strategy), microbatch_size=3
            )
            torch.testing.assert_close(result.grad_norms.cpu(), expected.grad_norms)
            for name, total in result.grads.items():
                torch.testing.assert_close(total.cpu(), expected.grads[name], rtol=1e-9, atol=1e-10)
    assert bool(taken) == cudnn


def test_learned_state_and_projection() -> None:
    """A projection takes the loop; an initial state that needs a gradient goes through cuDNN."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(3, 4, batch_first=True, dtype=DOUBLE)
            self.outer = nn.LSTM(4, 4, batch_first=True, proj_size=2, dtype=DOUBLE)
            self.h, self.c = nn.Parameter(draw(1, 1, 4)), nn.Parameter(draw(1, 1, 4))

        def forward(self, x: Tensor) -> Any:
            start = tuple(state.expand(-1, len(x), -1).contiguous() for state in (self.h, self.c))
            y, last = self.inner(x, start)
            return self.outer(y), last

    torch.manual_seed(0)
    model, x = Learned(), draw(5, 12, 3)
    expected, result = clipped(model, x, "cpu"), clipped(model, x, "cuda")
    for name, total in result.grads.items():
        torch.testing.assert_close(total.cpu(), expected.grads[name], rtol=1e-9, atol=1e-10)


def test_half_precision_under_autocast() -> None:
    model, x = nn.GRU(8, 16, batch_first=True), torch.randn(4, 12, 8)
    expected = clipped(model, x, "cpu")
    with torch.autocast("cuda", dtype=torch.float16):
        result = clipped(model, x, "cuda")
    torch.testing.assert_close(result.grad_norms.cpu(), expected.grad_norms, rtol=0.02, atol=0.02)
