"""Unmodified Hugging Face models: exact, and fast where it matters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import clipgrad
from tests import oracle
from tests.architectures import Architecture
from tests.hf_models import HF_MODELS
from tests.nightly import every, some

pytest.importorskip("transformers")

MAX_NORM = 0.5
TIED = {
    "gpt2": "transformer.wte.weight",
    "gpt2_eager_padded": "transformer.wte.weight",
    "bert_full_mask": "bert.embeddings.word_embeddings.weight",
    "llama_tied": "model.embed_tokens.weight",
    "t5": "shared.weight",
}


def functional(
    architecture: Architecture, model: nn.Module
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The architecture's loss as a function of the parameters, and the parameters."""

    def loss(params: dict[str, Tensor], *batch: Any) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, params, args, kwargs)

        return architecture.loss(call, *batch)

    return loss, {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "microbatch_size"), some(6, list(HF_MODELS), [None, 3]))
def test_equals_a_loop_over_samples(name: str, microbatch_size: int | None) -> None:
    architecture = HF_MODELS[name]
    model, batch = architecture.build(4)
    loss, params = functional(architecture, model)
    options = {"max_grad_norm": MAX_NORM, "microbatch_size": microbatch_size}
    result = clipgrad.clipped_grad(loss, **options)(params, *batch)
    each = oracle.per_sample_gradients(model, architecture.loss, batch)
    sums, norms = oracle.clipped_sum(each, MAX_NORM)
    assert (norms > MAX_NORM).any()
    torch.testing.assert_close(result.grads, sums, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.grad_norms, norms, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", every(3, HF_MODELS))
def test_no_weight_takes_the_fallback(name: str) -> None:
    """What is left to it are sums of an activation and a vector, which cost the same there."""
    architecture = HF_MODELS[name]
    model, batch = architecture.build(2)
    loss, params = functional(architecture, model)
    rows = clipgrad.clipped_grad(loss, max_grad_norm=MAX_NORM).explain(params, *batch).rows
    assert [row for row in rows if "fallback" in row.by and len(row.shape) in (2, 4)] == []


@pytest.mark.parametrize("name", TIED)
def test_tied_weight_need_not_be_materialised(name: str) -> None:
    """Its per-sample gradient has the size of the vocabulary; both uses have factors, and join their norms."""
    architecture = HF_MODELS[name]
    model, batch = architecture.build(2)
    loss, params = functional(architecture, model)
    ghost = clipgrad.clipped_grad(
        loss, max_grad_norm=MAX_NORM, performance=clipgrad.Performance(strategy="ghost")
    )
    rows = ghost.explain(params, *batch).rows
    (row,) = [row for row in rows if row.parameter == TIED[name]]
    assert row.strategy == "ghost"
    assert set(re.sub(r" x\d+", "", row.by).split(", ")) == {"embedding", "linear"}
