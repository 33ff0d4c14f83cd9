"""What a loss may not do, and the words with which clipgrad says so and what to do instead."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import cached
from torch.utils.checkpoint import checkpoint

from clipgrad import Performance, clipped_grad
from clipgrad.errors import EscapedParameterError, NotPerSampleError
from tests.dp_tools import clipped, data, mlp, picture, private, squared, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
Loss = Callable[[Any, Tensor], Any]
STATE = torch.zeros(4, dtype=torch.float64)
STRANGER = nn.Parameter(torch.ones(2, dtype=torch.float64))
TEACHER = nn.Linear(4, 2).double()


def _fixed_zeros(m: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
    out[:, :2] = m(x)
    return out.square().sum()


def _written_clone(m: nn.Sequential, x: Tensor) -> Tensor:
    weight = m[0].weight.clone()
    weight[0] = 0
    return F.linear(x, weight).square().sum()


def _while(m: nn.Module, x: Tensor) -> Tensor:
    while x.sum() > 0:
        x = x - 1
    return m(x).sum()


def _without_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m(x).sum()


def _changed_input(m: nn.Sequential, x: Tensor) -> Tensor:
    hidden = m[0](x).tanh()
    out = m[2](hidden)
    hidden.mul_(2.0)
    return out.sum() + hidden.sum()


def _changed_intermediate(m: nn.Sequential, x: Tensor) -> Tensor:
    hidden = m[0](x).exp()
    hidden.mul_(2.0)
    return m[2](hidden).sum()


def _hooked(m: nn.Sequential, x: Tensor) -> Tensor:
    hidden = m[0](x)
    hidden.register_hook(lambda grad: 2 * grad)
    return m[2](hidden).sum()


def _written(write: Callable[[Tensor], Any]) -> Loss:
    def loss(m: nn.Sequential, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(m[0].weight)
        return m(x).sum()

    return loss


def _inner_gradient(m: nn.Module, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(m(x).sum(), list(m.parameters())[:1], create_graph=True)
    return gradient.square().sum()


def _inner_backward(m: nn.Module, x: Tensor) -> Tensor:
    loss = squared(m, x)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return loss


def _functional_batch_norm(m: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(m(x), STATE[:2], STATE[:2] + 1, training=True).sum()


def _batch_norm_without_statistics(m: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(m(x)[:, :, None], None, None, training=True).sum()


def _bounded_embedding(m: nn.Sequential, x: Tensor) -> Tensor:
    return F.embedding(x[0].abs().long() % 6, m[0].weight, max_norm=1.0).sum()


def _channels_last(m: nn.Module, x: Tensor) -> Tensor:
    image = x.view(1, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    return m(image.flatten(1)).sum()


BRANCH = r"branches on the value of a tensor.*torch\.where"
ITEM = r"\.item\(\) \(or int\(\), float\(\)\).*Keep it a tensor"
SHAPE = r"shape depends on the data.*mask of fixed shape"
RAW = r"tolist, numpy, deepcopy, pickle.*Use tensor operations"
SCALAR = r"must return a scalar tensor.*\.mean\(\) or \.sum\(\)"
PARAMETER = r"parameter '0\.weight' in place.*after optimizer\.step\(\).*out of place"
SHARED = r"in place into a tensor that all samples share.*out-of-place.*outside the loss"
NO_GRADIENT = r"does not depend on any parameter.*let the gradient through"
TORCH_FUNC = r"requires_grad_\(\), backward\(\) or torch\.autograd.*torch\.func\.grad"
BATCH_NORM = r"BatchNorm.*replace_batch_norm"

# what the loss does on a model of two layers -> what the message says
LOSSES: dict[str, tuple[Loss, str]] = {
    "if": (lambda m, x: m(x).sum() if x.sum() > 0 else m(-x).sum(), BRANCH),
    "if parameter": (lambda m, x: m(x).sum() if m[0].weight.norm() < 9 else 0, BRANCH),
    "while": (_while, BRANCH),
    "isnan().any()": (lambda m, x: 0 if x.isnan().any() else m(x).sum(), BRANCH),
    "torch.equal": (lambda m, x: m(x).sum() if torch.equal(x, x) else 0, BRANCH),
    "torch.allclose": (lambda m, x: m(x).sum() if torch.allclose(x, x) else 0, BRANCH),
    "item": (lambda m, x: m(x).sum() * x.sum().item(), ITEM),
    "int": (lambda m, x: m(x).sum() * int(x[0, 0]), ITEM),
    "float": (lambda m, x: m(x).sum() * float(m[0].bias.sum()), ITEM),
    "slice by data": (lambda m, x: m(x)[:, : int((x > 0).sum())].sum(), ITEM),
    "nonzero": (lambda m, x: m(x).sum() * (x > 0).nonzero().shape[0], SHAPE),
    "where of one": (lambda m, x: m(x).sum() * torch.where(x > 0)[0].shape[0], SHAPE),
    "boolean index": (lambda m, x: m(x)[m(x) > 0].sum(), SHAPE),
    "masked_select": (lambda m, x: m(x).masked_select(m(x) > 0).sum(), SHAPE),
    "unique": (lambda m, x: m(x).sum() * x.unique().numel(), SHAPE),
    "tolist": (lambda m, x: m(x).sum() * x.tolist()[0][0], RAW),
    "deepcopy": (lambda m, x: copy.deepcopy(m)(x).sum(), RAW),
    "vector": (lambda m, x: m(x).mean(-1), SCALAR + r".*has_aux=True"),
    "matrix": (lambda m, x: m(x), r"shape \(1, 2\)"),
    "three values": (
        lambda m, x: (m(x).sum(), x, x),
        r"got tuple.*return \(loss, metrics\) to DPOptimizer.*clipped_grad with has_aux=True",
    ),
    "number": (lambda m, x: 3.0, r"got float"),
    "nothing": (lambda m, x: None, r"got NoneType"),
    "integer": (lambda m, x: m(x).sum().long(), r"floating-point scalar, got torch\.int64"),
    "complex": (lambda m, x: torch.complex(m(x).sum(), m(x).sum()), r"got torch\.complex128"),
    "detached": (lambda m, x: m(x).sum().detach(), NO_GRADIENT),
    "no_grad": (_without_grad, NO_GRADIENT),
    "other tensors": (lambda m, x: x.square().sum(), NO_GRADIENT),
    "clamp_": (_written(lambda w: w.clamp_(-0.1, 0.1)), PARAMETER),
    "copy_": (_written(lambda w: w.copy_(w / 2)), PARAMETER),
    "item assignment": (_written(lambda w: w.__setitem__(0, 0.0)), PARAMETER),
    "init": (_written(nn.init.zeros_), PARAMETER),
    ".data": (_written(lambda w: w.data.mul_(2)), r"\.data.*\.detach\(\).*outside the loss"),
    "= .data": (_written(lambda w: setattr(w, "data", 2 * w.detach())), r"\.data"),
    "outside tensor": (lambda m, x: (STATE.add_(x[0]), squared(m, x))[1], SHARED),
    "outside element": (lambda m, x: (STATE.index_fill_(0, x[0].long(), 1.0), 0)[1], SHARED),
    "zeros of the loss": (_fixed_zeros, r"torch\.zeros\(\.\.\.\).*x\.new_zeros.*torch\.zeros_like\(x\)"),
    "clone of a parameter": (_written_clone, r"in place to Tensor\.clone\(0\.weight\), which is computed.*w \* mask"),
    "out=": (lambda m, x: m(torch.mul(x, 2, out=STATE[None])).sum(), SHARED),
    "input changed": (_changed_input, r"input of linear was changed.*out-of-place form"),
    "value changed": (_changed_intermediate, r"changes in place.*PyTorch refuses.*x = x \* 2"),
    "hook": (_hooked, r"registers a hook.*pre_clipping_transform"),
    "retain_grad": (lambda m, x: (m[0].bias.retain_grad(), squared(m, x))[1], r"retain_grad"),
    "autograd.grad": (_inner_gradient, TORCH_FUNC),
    "backward": (_inner_backward, TORCH_FUNC),
    "requires_grad_": (lambda m, x: m(x.requires_grad_()).sum(), TORCH_FUNC),
    "checkpoint": (
        lambda m, x: m[2](checkpoint(m[0], x, use_reentrant=True)).sum(),
        r"torch\.utils\.checkpoint, pass use_reentrant=False",
    ),
    "foreign parameter": (lambda m, x: (m(x) * STRANGER).sum(), r"shape \(2,\).*register it.*or detach"),
    "teacher": (lambda m, x: F.mse_loss(m(x), TEACHER(x)), r"requires grad.*escape.*detach it"),
    "functional batch norm": (_functional_batch_norm, BATCH_NORM),
    "batch norm, no statistics": (_batch_norm_without_statistics, BATCH_NORM),
    "max_norm": (_bounded_embedding, r"max_norm=1\.0.*F\.normalize"),
    "memory format": (_channels_last, r"memory_format.*before backward"),
    "no batching rule": (lambda m, x: m(F.rrelu(x, training=True)).sum(), r"aten::rrelu.*register_decomposition"),
    "assertion": (lambda m, x: (torch._assert_async(x.mean() < 9), m(x).sum())[1], r"asserts something.*num_nonfinite"),
}  # fmt: skip


@pytest.mark.parametrize("microbatch_size", [1, None])
@pytest.mark.parametrize("name", list(LOSSES))
def test_losses(name: str, microbatch_size: int | None) -> None:
    loss, message = LOSSES[name]
    model = mlp()
    state, before, weights = STATE.clone(), picture(model), values(model)
    optimizer = private(model, loss, microbatch_size=microbatch_size)
    with pytest.raises(NotPerSampleError, match=message) as caught:
        optimizer.backward(data())
    assert len(str(caught.value)) < 420
    assert all(p.grad is None for p in model.parameters())
    assert picture(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in values(model).items())
    assert torch.equal(STATE, state)
    optimizer.loss_fn = squared  # nothing is left of the failure
    optimizer.backward(data())


@pytest.mark.parametrize("road", ["list", "closure", "partial", "view made early", "penalty"])
def test_parameters_by_another_road(road: str) -> None:
    model = mlp()
    parameters, weight = list(model.parameters()), model[0].weight
    roads: dict[str, Loss] = {
        "list": lambda m, x: F.linear(x, parameters[0]).sum() + squared(m, x),
        "closure": lambda m, x: F.linear(x, weight).sum(),
        "partial": functools.partial(lambda m, x, w: (x @ w.t()).sum(), w=weight),
        "view made early": lambda m, x, half=weight[:3]: F.linear(x, half).sum(),
        "penalty": lambda m, x: squared(m, x) + sum(p.square().sum() for p in parameters),
    }
    with pytest.raises(EscapedParameterError, match=r"escape clipping.*register it") as caught:
        private(model, roads[road]).backward(data())
    assert road == "view made early" or "'0." in str(caught.value)


@pytest.mark.parametrize(
    "zeros", [lambda x: x.new_zeros(x.shape[0], 2), lambda x: torch.zeros_like(x[:, :2])]
)
def test_zeros_of_each_sample_may_be_written_to(zeros: Callable[[Tensor], Tensor]) -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        out = zeros(x)
        out[:, :1] = m(x)[:, :1]
        return out.square().sum()

    model = mlp()
    optimizer = private(model, loss)
    optimizer.backward(data())
    expected = clipped(model, data(), loss=lambda m, x: m(x)[:, :1].square().sum())[0]
    torch.testing.assert_close(optimizer.clipped_sums, expected)


def test_randomness_error() -> None:
    optimizer = private(
        mlp(), lambda m, x: squared(m, F.dropout(x)), performance=Performance(randomness="error")
    )
    with pytest.raises(NotPerSampleError, match=r'loss is random.*randomness="different"'):
        optimizer.backward(data())


def test_inference_mode() -> None:
    optimizer = private(mlp())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode.*no_grad"):
        optimizer.backward(data())


@pytest.mark.parametrize("old", [True, False])
def test_spectral_norm_in_training_mode(old: bool) -> None:
    normed = nn.utils.spectral_norm if old else parametrizations.spectral_norm
    model = normed(nn.Linear(4, 2)).double()
    with pytest.raises(NotPerSampleError, match=r"buffer.*eval mode"):
        private(model).backward(data())
    private(model.eval()).backward(data())


def test_batch_norm_switched_to_training_later() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    optimizer = private(model)
    model.train()
    with pytest.raises(NotPerSampleError, match=r"BatchNorm.*replace_batch_norm"):
        optimizer.backward(data())
    assert int(model[1].num_batches_tracked) == 0


def test_has_aux() -> None:
    gradient = clipped_grad(lambda p, x: (p * x).sum(), max_grad_norm=1.0, has_aux=True)
    with pytest.raises(NotPerSampleError, match=r"has_aux=True needs .*\(loss, aux\), got Tensor"):
        gradient(torch.ones(4, dtype=torch.float64), data())


# ------------------------------------------------------------- values that outlive the batch


def test_a_parametrization_cached_across_microbatches() -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 2)).double()
    optimizer = private(model, microbatch_size=2)
    with cached(), pytest.raises(NotPerSampleError, match=r"kept from an earlier.*cache"):
        optimizer.backward(data())
    optimizer.backward(data())
