"""What once ended in somebody else's words: now it is exact, or says what to do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import Performance, clipped_grad
from clipgrad.engine import reference
from clipgrad.errors import NotPerSampleError
from clipgrad.testing import Params
from tests.dp_tools import clipped, data, mlp, private, squared
from tests.nightly import every

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:.*prototype stage", "ignore:.*beta state"
)
STRATEGIES = ("kept", "ghost")


def normal(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    )


def assert_exact(
    loss: Callable[..., Tensor], params: Params, *batch: Tensor, norm: float = 1.0, **options: Any
) -> None:
    _, gradients = reference.per_sample_gradients_by_loop(loss, params, *batch)
    sums, norms = reference.clipped_sum(gradients, norm)
    result = clipped_grad(loss, max_grad_norm=norm, **options)(params, *batch)
    torch.testing.assert_close(result.grad_norms, norms, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(result.grads), sums, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- no images


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_convolutions_of_no_images(kind: str, axes: int, strategy: str) -> None:
    convolution = getattr(F, f"{kind}{axes}d")
    params = {
        "w": normal(*((3, 2) if kind == "conv" else (2, 3)), *[2] * axes),
        "b": normal(3),
    }

    def loss(p: Params, x: Tensor) -> Tensor:
        some = convolution(x, p["w"], p["b"]).square().sum()
        none = convolution(x[:0], p["w"], p["b"]).sum()
        total: Tensor = some + none + p["b"].sum()
        return total

    assert_exact(
        loss, params, normal(3, 2, *[4] * axes), performance=Performance(strategy=strategy)
    )
    only_none = lambda p, x: convolution(x[:0], p["w"], p["b"]).sum() + p["b"].square().sum()  # noqa: E731
    assert_exact(
        only_none, params, normal(3, 2, *[4] * axes), performance=Performance(strategy=strategy)
    )
    empty = clipped_grad(loss, max_grad_norm=1.0, performance=Performance(strategy=strategy))(
        params, normal(0, 2, *[4] * axes)
    )
    assert not any(total.any() for total in empty.grads.values())


# ------------------------------------------------------------------------------ layouts of tensors


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=layout)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "COO": (lambda x: x.to_sparse(), r"sparse_coo tensor.*to_dense\(\)"),
    "hybrid COO": (lambda x: x.to_sparse(1), r"sparse_coo tensor.*to_dense\(\)"),
    "CSR": (lambda x: x.to_sparse_csr(), r"sparse_csr tensor.*to_dense\(\)"),
    "CSC": (lambda x: x.to_sparse_csc(), r"sparse_csc tensor.*to_dense\(\)"),
    "BSR": (lambda x: x.to_sparse_bsr((2, 2)), r"sparse_bsr tensor.*to_dense\(\)"),
    "nested": (lambda x: nested(x, torch.strided), r"nested tensor.*to_padded_tensor"),
    "jagged": (lambda x: nested(x, torch.jagged), r"nested tensor.*to_padded_tensor"),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_batches_and_parameters_that_are_not_dense(name: str) -> None:
    change, message = LAYOUTS[name]
    params, x = {"w": normal(2, 4)}, normal(4, 4)
    gradient = clipped_grad(lambda p, x: F.linear(x, p["w"]).sum(), max_grad_norm=1.0)
    with pytest.raises(ValueError, match=message):
        gradient(params, change(x))
    with pytest.raises(ValueError, match=message):
        clipped_grad(lambda p, b: b["x"].sum(), max_grad_norm=1.0)(params, {"x": change(x)})
    with pytest.raises(ValueError, match=r"params\['w'\] is a " + message):
        gradient({"w": change(x)}, x)
    with pytest.raises(ValueError, match=message):
        private(mlp()).backward(change(data(4)))


# -------------------------------------------------------------------------------- embedding bags

IDS = torch.tensor([[0, 1, 1, 3], [2, 2, 0, 4], [3, 3, 3, 3]])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("offsets", [[0, 2], [0, 0, 3], [0, 4], [0]])
def test_embedding_bags_with_offsets(offsets: list[int], mode: str) -> None:
    def loss(p: Params, ids: Tensor) -> Tensor:
        bags = F.embedding_bag(ids[0], p["e"], torch.tensor(offsets), mode=mode)
        return (bags.square() * torch.arange(1, 4)).sum()

    assert_exact(loss, {"e": normal(5, 3)}, IDS)


def test_an_empty_batch_before_an_embedding_bag() -> None:
    model = nn.EmbeddingBag(5, 3, mode="sum").double()
    optimizer = private(model)
    optimizer.backward(IDS[:0])
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(IDS)

    def loss(p: Params, ids: Tensor) -> Tensor:
        return F.embedding_bag(ids, p["weight"], mode="sum").square().mean()

    params = {"weight": model.weight.detach()}
    expected = clipped_grad(loss, max_grad_norm=1.0)(params, IDS).grads["weight"]
    torch.testing.assert_close(optimizer.clipped_sums["weight"], expected)


# --------------------------------------------------------------------------------- cross entropy


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_with_weights_and_smoothing(
    reduction: str, smoothing: float, shape: tuple[int, ...], ignored: bool
) -> None:
    weights = normal(4).abs() + 0.1

    def loss(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            F.linear(x, p["w"]).movedim(-1, 1),
            y,
            weight=weights,
            label_smoothing=smoothing,
            reduction=reduction,
            ignore_index=2,
        ).sum()

    params, x = {"w": normal(4, 3)}, normal(5, *shape, 3)
    y = torch.arange(5 * torch.Size(shape).numel()).view(5, *shape) % (4 if ignored else 2)
    assert_exact(loss, params, x, y)  # without further axes the third sample has no target: NaN
    assert_exact(lambda p, x: loss(p, x, y[:1]), params, x)  # a target that all samples share


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_with_weights_of_a_sample_and_with_probabilities(smoothing: float) -> None:
    params, x, y = {"w": normal(4, 3)}, normal(5, 3), torch.arange(5) % 4

    def loss(p: Params, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, p["w"]), y, weights[0], label_smoothing=smoothing)

    assert_exact(loss, params, x, y, normal(5, 4).exp())
    assert_exact(loss, params, x, normal(5, 4).softmax(1), normal(5, 4).exp())


# ----------------------------------------------------------------------------------------- hooks


def test_a_hook_on_a_node() -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        y = m(x)
        y.grad_fn.register_hook(lambda inputs, outputs: inputs)
        return y.square().mean()

    with pytest.raises(NotPerSampleError, match=r"grad_fn\.register_hook.*pre_clipping_transform"):
        private(mlp(), loss).backward(data())


# ------------------------------------------------------------------------- gradient checkpointing


def test_inputs_that_are_made_to_require_grad() -> None:
    """What PEFT's ``enable_input_require_grads`` registers; it changes nothing where the layer is trained."""
    model = mlp()
    handle = model[0].register_forward_hook(
        lambda module, args, output: output.requires_grad_(True)
    )
    optimizer = private(model)
    optimizer.backward(data())
    torch.testing.assert_close(optimizer.clipped_sums, clipped(model, data())[0])
    model[0].requires_grad_(False)
    with pytest.raises(
        NotPerSampleError,
        match=r"enable_input_require_grads.*remove it: model\.disable_input_require_grads\(\)",
    ) as caught:
        private(model).backward(data())
    assert len(str(caught.value)) < 420
    handle.remove()
    private(model).backward(data())


@pytest.mark.parametrize("reentrant", every(2, [False, True]))
def test_gradient_checkpointing_of_hugging_face(reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().train()
    ids = torch.randint(0, 11, (3, 5))

    def loss(m: Any, ids: Tensor) -> Tensor:
        found: Tensor = m(ids, labels=ids, use_cache=False).loss
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name for it
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizer = private(model, loss)
    optimizer.backward(ids)
    expected = clipped(model, ids, loss=loss)[0]
    torch.testing.assert_close(optimizer.clipped_sums, expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------- values that are logged

LOGGED = r"(value that the loss kept|per-sample value that the loss kept).*has_aux=True.*optimizer\.diagnostics"
READ = r"To log (it|a value), read optimizer\.diagnostics after backward\(\), or return it as .*has_aux=True\)"


class Logged(nn.Module):
    """A module that logs as Lightning's do."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.read = mlp(), read
        self.losses: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        loss = self.layer(x).square().mean()
        self.log("loss", loss)
        return loss

    def log(self, name: str, value: Tensor) -> None:
        logging.getLogger("tests").debug("%s", name)
        self.losses.append(self.read(value))


def forward(m: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = m(x)
    return found


INSIDE: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t.item(),
    "detached item": lambda t: t.detach().item(),
    "float": float,
    "numpy": lambda t: t.detach().cpu().numpy(),
    "tolist": lambda t: t.tolist(),
}
AFTERWARDS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t.item(),
    "float": float,
    "mean": lambda t: t.mean(),
    "sum with another": lambda t: t + 1,
    "running value": lambda t: 0.9 * torch.ones(()) + 0.1 * t,
    "stack": lambda t: torch.stack([t, t]),
    "numpy": lambda t: t.detach().numpy(),
    "tolist": lambda t: t.tolist(),
    "format": lambda t: f"{t:.3f}",
    "comparison": lambda t: bool(t > 0),
    "moved": lambda t: t.cpu().double() + 0,
}


@pytest.mark.parametrize("name", list(INSIDE))
def test_values_read_inside_the_loss(name: str) -> None:
    with pytest.raises(NotPerSampleError, match=READ) as caught:
        private(Logged(INSIDE[name]), forward).backward(data())
    assert len(str(caught.value)) < 420


@pytest.mark.parametrize("keep", [lambda t: t, lambda t: t.detach(), lambda t: t.detach().clone()])
@pytest.mark.parametrize("name", list(AFTERWARDS))
def test_values_used_after_the_pass(name: str, keep: Callable[[Tensor], Tensor]) -> None:
    model = Logged(keep)
    optimizer = private(model, forward)
    optimizer.backward(data())
    (kept,) = model.losses
    assert kept.shape == ()
    assert kept.dtype is torch.float64
    assert isinstance(kept, Tensor)
    assert "BatchedTensor" in repr(kept)
    with pytest.raises(NotPerSampleError, match=LOGGED) as caught:
        AFTERWARDS[name](kept)
    assert len(str(caught.value)) < 420


def test_a_running_value_of_the_next_pass() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mlp()
            self.mean: Any = 0.0

        def forward(self, x: Tensor) -> Tensor:
            loss = squared(self.layer, x)
            self.mean = 0.9 * self.mean + 0.1 * loss.detach()
            return loss

    optimizer = private(Running(), forward)
    optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match=LOGGED):
        optimizer.backward(data())


def test_what_the_messages_advise() -> None:
    """Auxiliary output and diagnostics hold what was to be logged; other results keep their class."""

    def loss(p: Params, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = F.linear(x, p["w"])
        return y.square().sum(), {"mean": y.mean().detach()}

    result = clipped_grad(loss, max_grad_norm=1.0, has_aux=True)({"w": normal(2, 4)}, normal(3, 4))
    assert type(result.aux["mean"]) is Tensor
    assert result.aux["mean"].shape == (3,)
    assert all(type(leaf) is Tensor for leaf in (result.values, *result.grads.values()))
    optimizer = private(mlp())
    optimizer.backward(data())
    assert optimizer.diagnostics is not None
