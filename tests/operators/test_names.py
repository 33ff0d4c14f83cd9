"""What is corrected, or has a rule, is recognised by every name of the operation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipgrad
from clipgrad.engine import reference
from clipgrad.engine.fallback import CORRECTIONS
from clipgrad.errors import NotPerSampleError
from clipgrad.rules.names import names_of
from clipgrad.rules.registry import rules

Params = dict[str, Tensor]
X = torch.linspace(-1, 1, 60, dtype=torch.float64).sin().view(3, 5, 4)
IDS = torch.tensor([[2, 1, 2, 0, 3, 2, 5], [1, 1, 2, 4, 4, 2, 0], [5, 2, 2, 2, 3, 1, 1]])
MATRIX = torch.tensor([[3, 1, 0, 1], [0, 2, 1, 0], [1, 0, 4, 1], [0, 1, 1, 2]], dtype=torch.float64)
INDEX = torch.tensor([0, 2])
PYTHONS_OWN = (torch.Tensor.register_hook, torch.Tensor.data_ptr)


def operation_of(function: Any) -> str:
    """ATen's name of what a function stands for, by its own name."""
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.name.partition("::")[2]
    return str(function.__name__)


def make_params() -> Params:
    torch.manual_seed(0)
    return {
        "w": torch.randn(6, 4, dtype=torch.float64),
        "v": torch.randn(4, 4, dtype=torch.float64),
    }


def check(loss: Callable[..., Tensor], *, may_be_refused: bool = False) -> None:
    """The loss is exact; or it is refused by a message of clipgrad's, if that is right too."""
    params = make_params()
    losses, each = reference.per_sample_gradients_by_loop(loss, params, X, IDS)
    expected, norms = reference.clipped_sum(each, 2.0)
    try:
        result = clipgrad.clipped_grad(loss, max_grad_norm=2.0)(params, X, IDS)
    except NotPerSampleError:
        if not may_be_refused:
            raise
        return
    torch.testing.assert_close(result.values, losses, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(result.grad_norms, norms, atol=1e-9, rtol=1e-9)
    for name, grad in expected.items():
        torch.testing.assert_close(result.grads[name], grad, atol=1e-9, rtol=1e-9)


def test_every_correction_holds_for_every_name() -> None:
    missing = [
        f"{name} (of {operation_of(function)})"
        for function in CORRECTIONS
        if function not in PYTHONS_OWN
        for name in names_of(operation_of(function))
        if name not in CORRECTIONS
    ]
    assert not missing


def test_a_name_left_out_is_noticed() -> None:
    """The walk above sees a correction of one name only: ATen's names of it are others."""
    alone = torch.linalg.inv
    assert alone in names_of(operation_of(alone))
    assert torch.ops.aten.linalg_inv.default in names_of("linalg_inv")
    assert torch.linalg.solve in names_of("linalg_solve")
    assert F.embedding in names_of("embedding")


# With arguments in ATen's order. What a function of Python's takes in another order is below.
ATEN: dict[str, Callable[[Callable[..., Any], Params, Tensor, Tensor], Any]] = {
    "embedding": lambda f, p, x, i: f(p["w"] * x.sum(), i[0], 2, True),
    "embedding_bag": lambda f, p, x, i: f(p["w"], i.flatten(), torch.tensor([0, 3]))[0],
    "_embedding_bag": lambda f, p, x, i: f(p["w"], i.flatten(), torch.tensor([0, 3]))[0],
    "scaled_dot_product_attention": lambda f, p, x, i: f(x @ p["v"], x, x * p["v"][0]),
    "layer_norm": lambda f, p, x, i: f(x * p["v"][0], (4,), p["v"][1], p["v"][2], 1e-5),
    "native_layer_norm": lambda f, p, x, i: f(x, (4,), p["v"][1], p["v"][2], 1e-5)[0],
    "as_strided": lambda f, p, x, i: f(x @ p["v"], (2, 2), (4, 1), 1),
    "as_strided_copy": lambda f, p, x, i: f(x @ p["v"], (2, 2), (4, 1), 1),
    "as_strided_": lambda f, p, x, i: f(x @ p["v"], (2, 2), (4, 1), 1),
    "as_strided_scatter": lambda f, p, x, i: f(x @ p["v"], x[0, :2, :2], (2, 2), (4, 1), 1),
    "select_scatter": lambda f, p, x, i: f(x[0], p["v"][0] * x[0, 0], 0, 1),
    "roll": lambda f, p, x, i: f(p["v"].sum() * x.sum(), [1]) + f(x @ p["v"], [1], [1]),
    "index_fill": lambda f, p, x, i: f(x @ p["v"], 1, INDEX, p["w"].sum()),
    "index_fill_": lambda f, p, x, i: f(x @ p["v"], 1, INDEX, p["w"].sum() * x.sum()),
    "linalg_solve": lambda f, p, x, i: f(MATRIX, (x @ p["v"]).mT),
    "linalg_solve_ex": lambda f, p, x, i: f(MATRIX, (x @ p["v"]).mT)[0],
    "_linalg_solve_ex": lambda f, p, x, i: f(MATRIX, (x @ p["v"]).mT)[0],
    "linalg_tensorsolve": lambda f, p, x, i: f(
        (p["v"] * x.sum() + MATRIX).view(2, 2, 4), MATRIX[:2, :2]
    ),
    "narrow": lambda f, p, x, i: f(x @ p["v"], 1, torch.tensor(1), 2),
    "tensor_split": lambda f, p, x, i: f(x @ p["v"], torch.tensor([1, 3]), 1)[1],
    "linear": lambda f, p, x, i: f(x, p["w"], p["w"][:, 0]),
    "matmul": lambda f, p, x, i: f(x, p["v"]),
    "mm": lambda f, p, x, i: f(x[0], p["v"]),
    "mv": lambda f, p, x, i: f(x[0], p["v"][0]),
    "addmm": lambda f, p, x, i: f(p["v"][0], x[0], p["v"]),
    "einsum": lambda f, p, x, i: f("bsi,oi->bso", [x, p["w"]]),
    "conv1d": lambda f, p, x, i: f(x.mT, p["v"].view(4, 4, 1), p["v"][0]),
    "conv_transpose1d": lambda f, p, x, i: f(x.mT, p["v"].view(4, 4, 1), p["v"][0]),
    "group_norm": lambda f, p, x, i: f(x.mT, 2, p["v"][0], p["v"][1], 1e-5),
    "rms_norm": lambda f, p, x, i: f(x * p["v"][1], (4,), p["v"][0], 1e-5),
}
OTHER_ORDER = {F.embedding, F.embedding_bag}
NAMES = [
    (operation, name)
    for operation in ATEN
    for name in names_of(operation)
    if name not in OTHER_ORDER
    # Overloads take other arguments (out=, dimensions by name); the packet chooses among them.
    and (not isinstance(name, torch._ops.OpOverload) or name._overloadname == "default")
]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
# Some names are told apart by their addresses only, which differ from process to process.
@pytest.mark.parametrize(
    ("operation", "name"), NAMES, ids=[f"{o}-{i}" for i, (o, _) in enumerate(NAMES)]
)
def test_every_name_is_exact_or_refused(operation: str, name: Callable[..., Any]) -> None:
    def loss(p: Params, x: Tensor, ids: Tensor) -> Tensor:
        output = ATEN[operation](name, p, x, ids)
        return output.sin().sum() + (p["w"].sum() + p["v"].sum()) * x.sum()

    check(loss, may_be_refused=operation.startswith("as_strided"))


def test_every_correction_is_tried() -> None:
    """An operation that is corrected takes part in the test above, or is named here with a reason."""
    elsewhere = {
        "multi_head_attention_forward",  # tests/operators/judge.py and tests/test_attention.py
        "linear_cross_entropy",  # tests/test_architectures.py
        "register_hook",  # refused: tests/test_refusals.py
        "__get__",  # of grad_fn: tests/test_foreign_code.py
        "cross_entropy",  # tests/test_raw_errors.py
        "data_ptr",  # not an operation on values
        "_nested_tensor_from_mask_left_aligned",  # answers a question
        "_pack_padded_sequence",  # refused: tests/test_recurrent.py
        "_cudnn_rnn_flatten_weight",  # does nothing
        *("lstm", "gru", "rnn_tanh", "rnn_relu"),  # tests/test_recurrent.py
        *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    }
    assert {operation_of(function) for function in CORRECTIONS} - elsewhere - set(ATEN) == set()


def test_rules_for_atens_names_run() -> None:
    """So that exported models stay fast."""
    for operation in ("linear", "mm", "matmul", "addmm", "einsum", "conv2d", "layer_norm"):
        packet = getattr(torch.ops.aten, operation)
        assert packet in rules()
        assert packet.default in rules()


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_an_exported_model(padding_idx: int | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(6, 4, padding_idx=padding_idx, dtype=torch.float64)
            self.out = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.words(ids)).sin()

    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.words.weight.normal_()
    exported = torch.export.export(model, (IDS[:1],)).module()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def of(module: nn.Module) -> Callable[[Params, Tensor], Tensor]:
        return lambda p, ids: torch.func.functional_call(module, p, (ids,)).sum()

    _, each = reference.per_sample_gradients_by_loop(of(copy.deepcopy(model)), params, IDS)
    expected, norms = reference.clipped_sum(each, 1.0)
    result = clipgrad.clipped_grad(of(exported), max_grad_norm=1.0)(params, IDS)
    torch.testing.assert_close(result.grad_norms, norms, atol=1e-9, rtol=1e-9)
    for name, grad in expected.items():
        torch.testing.assert_close(result.grads[name], grad, atol=1e-9, rtol=1e-9)


UNSEEN: dict[str, Callable[[Params, Tensor, Tensor], Tensor]] = {
    "embedding": lambda p, x, i: F.embedding(i, p["w"], 2),
    "embedding, by count": lambda p, x, i: F.embedding(i, p["w"], None, None, 2.0, True),
    "solve": lambda p, x, i: torch.linalg.solve(MATRIX, (x * p["v"][0]).mT),
    "as_strided": lambda p, x, i: torch.as_strided(p["v"], (2, 2), (1, 1)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_call_that_nobody_sees_is_refused(name: str) -> None:
    def loss(p: Params, x: Tensor, ids: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            value = UNSEEN[name](p, x, ids)
        return value.sin().sum()

    with pytest.raises(
        NotPerSampleError, match=r"where clipgrad cannot see it.*Call the operation"
    ):
        clipgrad.clipped_grad(loss, max_grad_norm=1.0)(make_params(), X, IDS)


SOLVERS: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "a constant matrix": lambda p, x: torch.linalg.solve(MATRIX, (x * p["v"][0]).mT),
    "from the right": lambda p, x: torch.linalg.solve(MATRIX, x * p["v"][0], left=False),
    "solve_ex": lambda p, x: torch.linalg.solve_ex(MATRIX, (x * p["v"][0]).mT)[0],
    "a constant right side": lambda p, x: torch.linalg.solve(p["v"] * x.sum() + MATRIX, MATRIX),
    "a constant vector": lambda p, x: torch.linalg.solve(p["v"] * x.sum() + MATRIX, MATRIX[0]),
    "a parameter as the matrix": lambda p, x: torch.linalg.solve(p["v"] + MATRIX, x[0].mT),
    "parameters alone": lambda p, x: torch.linalg.solve(p["v"], p["w"].mT) * x.sum(),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solve(name: str) -> None:
    check(lambda p, x, ids: SOLVERS[name](p, x).sin().sum())


def test_solve_inside_another_transform_is_refused() -> None:
    def loss(p: Params, x: Tensor, ids: Tensor) -> Tensor:
        def inner(right: Tensor) -> Tensor:
            return torch.linalg.solve(MATRIX, right).sin().sum()

        return torch.func.grad(inner)((x * p["v"][0]).mT).square().sum()

    with pytest.raises(NotPerSampleError, match=r"Inside another torch.func transform"):
        clipgrad.clipped_grad(loss, max_grad_norm=1.0)(make_params(), X, IDS)


NO_POSITIONS: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "linear": lambda p, x: F.linear(x[:, :0], p["w"]),
    "linear with bias": lambda p, x: F.linear(x[:, :0], p["w"], p["w"][:, 0]),
    "weight @ data": lambda p, x: p["w"] @ x.mT[..., :0],
    "data @ weight": lambda p, x: x[:, :0] @ p["v"],
    "addmm": lambda p, x: torch.addmm(p["v"][0], x[0, :0], p["v"]),
    "einsum": lambda p, x: torch.einsum("bsi,oi->bso", x[:, :0], p["w"]),
}


@pytest.mark.parametrize("name", NO_POSITIONS)
def test_no_positions(name: str) -> None:
    check(lambda p, x, ids: NO_POSITIONS[name](p, x).sum() + (p["w"].sum() * x.sum()).sin())


def test_places_to_cut_that_depend_on_the_sample() -> None:
    def loss(p: Params, x: Tensor, ids: Tensor) -> Tensor:
        return torch.narrow(x @ p["v"], 1, ids[0, 0], 1).sum()

    with pytest.raises(NotPerSampleError, match=r"per-sample tensor where to cut"):
        clipgrad.clipped_grad(loss, max_grad_norm=1.0)(make_params(), X, IDS)
