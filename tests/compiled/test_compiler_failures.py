"""Steps that TorchInductor once could not compile, each on the smallest model that shows it, and its errors."""

from __future__ import annotations

import cProfile
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from clipgrad import DPOptimizer
from clipgrad.errors import CompileError
from tests.compiled.conftest import Graphs
from tests.oracle import clipped_sum, per_sample_gradients


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def gptj() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTJConfig(
        n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32, rotary_dim=8, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.GPTJForCausalLM(config)
    return model


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def with_cache(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def texts(size: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (size, length))
    mask = (torch.arange(length) < torch.randint(3, length, (size, 1))).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def optimizer_of(
    model: nn.Module, loss: Any, bound: float, microbatch_size: int | None = None
) -> DPOptimizer:
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss, max_grad_norm=bound, noise_multiplier=0.0,
        expected_batch_size=1, compile=True, microbatch_size=microbatch_size,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        pytest.param(gpt2, torch.float32, 1e-5, id="gpt2", marks=pytest.mark.nightly),
        pytest.param(gpt2, torch.float64, 1e-9, id="gpt2-float64", marks=pytest.mark.nightly),
        pytest.param(gptj, torch.float32, 1e-5, id="gptj", marks=pytest.mark.nightly),
    ],
)
def test_language_models(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Of two heads and 24 samples, PyTorch could not view [24, 2, 16, 16] with strides (512, 16, 1, 32)."""
    torch.manual_seed(0)
    model, batch = make().to(dtype), texts(24, 16)
    gradients = per_sample_gradients(model, own_loss, (batch,))
    bound = float(clipped_sum(gradients, 1.0)[1].median())
    expected, _ = clipped_sum(gradients, bound)
    optimizer = optimizer_of(model, own_loss, bound)
    optimizer.backward(batch)
    for name, total in optimizer.clipped_sums.items():
        torch.testing.assert_close(total, expected[name], rtol=0, atol=tolerance * 24 * bound)


@pytest.mark.filterwarnings("ignore")
def test_under_a_profiler(graphs: Graphs) -> None:
    compiled_under_a_profiler()
    assert len(graphs) == 1


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cache_in_a_graph_of_one_size() -> None:
    """PyTorch could not view the transposed keys, which ``cat`` with an empty cache makes contiguous."""
    torch.manual_seed(0)
    model, batch = gptj(), texts(4, 16)
    expected, _ = clipped_sum(per_sample_gradients(model, own_loss, (batch,)), 1.0)
    optimizer = optimizer_of(model, with_cache, 1.0, microbatch_size=4)
    optimizer.backward(batch)
    for name, total in optimizer.clipped_sums.items():
        torch.testing.assert_close(total, expected[name], rtol=0, atol=4e-5)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_inductor_under_a_profiler() -> None:
    compiled_under_a_profiler()


def compiled_under_a_profiler() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = optimizer_of(model, lambda model, x: model(x).square().sum(), 1.0)
    with cProfile.Profile():
        optimizer.backward(x)
    assert set(optimizer.clipped_sums) == {"weight", "bias"}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_graphs_come_from_pytorchs_cache_also_for_other_lengths() -> None:
    """So a second process compiles nothing; operations of our own and names must not be in the way."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.gelu(model(x)).mean(1).square().sum()

    def cached() -> tuple[int, int]:  # the counter is another object after a reset
        found = counters["inductor"]
        return found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]

    with fresh_cache():
        before = cached()
        for lengths in ((4, 6), (4, 7, 5)):
            optimizer = optimizer_of(nn.Linear(3, 2), loss, 1.0)
            for length in lengths:
                optimizer.backward(torch.randn(4, length, 3))
        now = cached()
    assert (now[0] - before[0], now[1] - before[1]) == (2, 2)


def test_errors_say_what_pytorch_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Cannot view a tensor with shape [24, 2, 16, 16]")

    monkeypatch.setattr(torch._inductor, "compile", failing)
    optimizer = optimizer_of(nn.Linear(3, 2), lambda model, x: model(x).square().sum(), 1.0)
    with pytest.raises(CompileError, match=r"RuntimeError: Cannot view a tensor with shape \[24"):
        optimizer.backward(torch.randn(4, 3))
