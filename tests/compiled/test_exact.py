"""Compiled equals the definition: all architectures, Hugging Face models, every option of the transform."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.engine import gradients as gradients_module
from clipgrad.engine.reference import Params
from clipgrad.errors import CompileError, NotPerSampleError
from tests.architectures import ARCHITECTURES, COMPILED, Architecture
from tests.compiled.conftest import Graphs
from tests.dp_tools import trained
from tests.hf_models import HF_MODELS
from tests.nightly import chosen, every, picked, thinned
from tests.oracle import clipped_sum, per_sample_gradients
from tests.small_mlp import (
    B,
    assert_same,
    close,
    definition,
    make_batch,
    make_params,
    median_norm,
    mlp,
)
from tests.test_architectures import UNSUPPORTED, error_of, optimizer_for

# What cannot become a graph, and the reason that is given.
REFUSED = {
    "python_state": r"stores a tensor in .*PythonState.*control\.py:\d+",
    "embedding_bag_offsets": "reads the value of a tensor",
    "conv1d_same_even_kernel": r"_filters_mutated.*convolution\.py:\d+",
    "loss_distillation": "requires grad and is not among the parameters",
    "loss_gradient_penalty": r"a transform of torch\.func other than vmap.*losses\.py:\d+",
    "loss_second_derivatives": r"a transform of torch\.func other than vmap.*losses\.py:\d+",
    "loss_read_off_module": r"stores a tensor in an object of type Router.*:\d+",
    "weight_norm_hook": r"stores a tensor in an object of type Linear.*:\d+",
}
EXACT = [a for a in ARCHITECTURES.values() if not (a.refused or a.random or a.may_refuse)]
RANDOM = [a for a in ARCHITECTURES.values() if a.random and a.name not in UNSUPPORTED]

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


def check(architecture: Architecture, graphs: Graphs) -> None:
    model, batch = architecture.build(5)
    per_sample = per_sample_gradients(model, architecture.loss, batch)
    bound = float(clipped_sum(per_sample, 1.0)[1].median())
    sums, norms = clipped_sum(per_sample, bound)
    optimizer = optimizer_for(model, architecture, bound, compile=True, microbatch_size=3)
    optimizer.backward(*batch)  # a full graph, and one with a row of padding
    assert len(graphs) == 1
    found = optimizer.diagnostics.grad_norms
    assert isinstance(found, Tensor)
    slack = max(architecture.tolerance, 1e-9)
    assert error_of(found, norms, float(norms.max())) <= slack
    assert optimizer.clipped_sums.keys() == trained(model).keys()
    for name, total in optimizer.clipped_sums.items():
        assert error_of(total, sums[name], bound) <= slack, name


@pytest.mark.parametrize("name", chosen([a.name for a in EXACT], {*COMPILED, *REFUSED}))
def test_architecture_equals_the_loop(name: str, graphs: Graphs) -> None:
    if name in REFUSED:
        with pytest.raises((CompileError, NotPerSampleError), match=REFUSED[name]):
            check(ARCHITECTURES[name], graphs)
    else:
        check(ARCHITECTURES[name], graphs)


@pytest.mark.parametrize(
    "name", chosen([a.name for a in EXACT if a.name not in REFUSED], {"lora", "tied_embedding"})
)
def test_small_norms_joined_as_for_a_gpu(
    name: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "_JOINS_IN_GRAPHS", {"cpu"})
    check(ARCHITECTURES[name], graphs)


def test_a_sample_that_is_not_finite_where_small_norms_are_joined(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "_JOINS_IN_GRAPHS", {"cpu"})
    params, (x, y) = make_params(), make_batch()
    x[1] = torch.inf
    settings: dict[str, Any] = {
        "max_grad_norm": 0.5,
        "performance": Performance(strategy="kept"),
    }
    found = clipped_grad(mlp, **settings, compile=True)(params, x, y)
    assert found.num_nonfinite == 1
    for name, total in clipped_grad(mlp, **settings)(params, x, y).grads.items():
        close(found.grads[name], total)
    module = graphs.modules[0]
    assert module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


@pytest.mark.parametrize(
    "name",
    chosen(
        [name for name in HF_MODELS if not HF_MODELS[name].may_refuse],
        {"bert_classifier"},
    ),
)
def test_hugging_face_model_equals_the_loop(name: str, graphs: Graphs) -> None:
    pytest.importorskip("transformers")
    check(HF_MODELS[name], graphs)


@pytest.mark.parametrize(
    "architecture", thinned(RANDOM, lambda a: a.name == "dropout_alpha", lambda a: a.name)
)
def test_random_model_draws_what_the_eager_step_draws(
    architecture: Architecture, graphs: Graphs
) -> None:
    model, batch = architecture.build(5)
    found = []
    for compile in (False, True):
        optimizer = optimizer_for(model, architecture, compile=compile, microbatch_size=5)
        for seed in (1, 2):
            torch.manual_seed(seed)
            optimizer.backward(*batch)
            found.append(list(optimizer.clipped_sums.values()))
            optimizer.zero_grad()
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-9, atol=1e-10)
    assert any(not torch.equal(a, b) for a, b in zip(found[2], found[3], strict=True))
    assert len(graphs) == 1


OPTIONS: dict[str, dict[str, Any]] = {
    "groups": {"max_grad_norm": {"in": 0.1, "": 0.2}},
    "divided": {"normalize_by": 7.0},
    "unclipped": {"max_grad_norm": float("inf")},
    "nothing": {"max_grad_norm": 0.0},
    "no batch axis": {"keep_batch_dim": False},
    "float32 sums": {"performance": Performance(accumulate_dtype=torch.float32)},
    "ghost": {"performance": Performance(strategy="ghost")},
    "transformed": {"pre_clipping_transform": lambda g: {n: v.clamp(-0.1, 0.1) for n, v in g.items()}},
    "not nan safe": {"nan_safe": False},
}  # fmt: skip


# Groups run by day in tests/clipping/test_strategies.py, and what is not NaN safe in test_shape.py.
@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    picked(
        itertools.product(OPTIONS, [None, 4]), {"no batch axis-None", "nothing-4", "transformed-4"}
    ),
)
def test_option_changes_nothing(name: str, microbatch_size: int | None, graphs: Graphs) -> None:
    params, batch = make_params(), make_batch()

    def loss(p: Params, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return mlp(p, x, y), {"twice": 2 * x}

    options = {"max_grad_norm": median_norm(params, *batch), "has_aux": True, **OPTIONS[name]}
    mask = torch.arange(B) == 2
    for marked in (None, mask):
        eager = clipped_grad(loss, microbatch_size=microbatch_size, **options)
        compiled = clipped_grad(loss, microbatch_size=microbatch_size, compile=True, **options)
        assert_same(
            compiled(params, *batch, is_padding=marked), eager(params, *batch, is_padding=marked)
        )
        assert compiled.sensitivity() == eager.sensitivity()
    assert len(graphs) == 2


def test_other_arguments_are_inputs(graphs: Graphs) -> None:
    params, (x, y) = make_params(), make_batch()

    def loss(p: Params, x: Tensor, scale: dict[str, Any], y: Tensor) -> Tensor:
        return mlp(p, x * scale["tensor"], y) * scale["number"]

    options = {"max_grad_norm": 0.5, "batch_argnums": (1, 3)}
    eager, compiled = clipped_grad(loss, **options), clipped_grad(loss, compile=True, **options)
    for tensor, number, expected in ((1.0, 1.0, 1), (2.0, 1.0, 1), (2.0, 3.0, 2)):
        scale = {"tensor": torch.tensor(tensor, dtype=x.dtype), "number": number}
        assert_same(compiled(params, x, scale, y), eager(params, x, scale, y))
        assert len(graphs) == expected


@pytest.mark.parametrize("dtype", every(2, [torch.float32, torch.bfloat16]))
def test_dtype_is_part_of_the_signature(dtype: torch.dtype, graphs: Graphs) -> None:
    params, (x, y) = make_params(), make_batch()
    compiled, eager = (clipped_grad(mlp, max_grad_norm=0.5, compile=c) for c in (True, False))
    for kind in (torch.float64, dtype, torch.float64):
        cast = {name: p.to(kind) for name, p in params.items()}
        result, expected = compiled(cast, x.to(kind), y), eager(cast, x.to(kind), y)
        close(result.grads, expected.grads)
    assert len(graphs) == 2


@pytest.mark.nightly
def test_autocast_is_part_of_the_signature(graphs: Graphs) -> None:
    params, (x, y) = make_params(), make_batch()
    params, x = {name: p.float() for name, p in params.items()}, x.float()
    compiled, eager = (clipped_grad(mlp, max_grad_norm=0.5, compile=c) for c in (True, False))
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_same(compiled(params, x, y), eager(params, x, y))
    assert len(graphs) == 2


def test_sums_belong_to_the_caller(graphs: Graphs) -> None:
    params, batch = make_params(), make_batch()
    gradient = clipped_grad(mlp, max_grad_norm=0.5, compile=True)
    first = gradient(params, *batch)
    kept = {name: total.clone() for name, total in first.grads.items()}
    for total in first.grads.values():
        total.add_(1)
    again = gradient(params, *batch)
    close(again.grads, kept)
    close(again.grads, definition(params, *batch, norm=0.5)[0])


def test_channels_last_batch(graphs: Graphs) -> None:
    def loss(p: Params, x: Tensor) -> Tensor:
        return F.conv2d(x, p["w"], padding=1).square().mean()

    params = {"w": torch.randn(4, 3, 3, 3, dtype=torch.float64)}
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    compiled, eager = (clipped_grad(loss, max_grad_norm=0.01, compile=c) for c in (True, False))
    for batch in (x, x.to(memory_format=torch.channels_last)):
        for rows in (4, 3, 1):
            assert_same(compiled(params, batch[:rows]), eager(params, batch[:rows]))
    assert len(graphs) == 2
