"""Recurrent layers: values, refusals, and roads that the rule cases do not take."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import clipgrad
from clipgrad import Performance
from tests import oracle
from tests.rule_cases.recurrent import DOUBLE, draw, flat_weights, flatten, score, zeros

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
SIZE, STEPS = 3, 4


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def outputs_of(model: nn.Module, batch: tuple[Any, ...], **options: Any) -> list[Tensor]:
    """What the model returns inside the transform, one row per sample."""

    def loss(params: dict[str, Tensor], *sample: Any) -> tuple[Tensor, list[Tensor]]:
        outputs = flatten(functional_call(model, params, sample))
        return score(*outputs), outputs

    transform = clipgrad.clipped_grad(loss, max_grad_norm=1.0, has_aux=True, **options)
    aux: list[Tensor] = transform(parameters(model), *batch).aux
    return aux


def assert_exact(
    model: nn.Module, batch: tuple[Any, ...], loss: Callable[..., Tensor], **options: Any
) -> None:
    """Norms and clipped sums of ``loss(model, *sample)`` equal those of a loop over samples."""

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *sample: Any) -> Tensor:
            return loss(self.inner, *sample)

    bound = Bound()
    transform = clipgrad.clipped_grad(
        lambda params, *sample: functional_call(bound, params, sample), max_grad_norm=0.5, **options
    )
    result = transform(parameters(bound), *batch)
    expected = oracle.per_sample_gradients(bound, lambda m, *sample: m(*sample), batch)
    sums, norms = oracle.clipped_sum(expected, 0.5)
    torch.testing.assert_close(result.grad_norms, norms, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(result.grads), sums, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("kind", "more"), [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {}), (nn.RNN, {})]
)
def test_outputs_equal_the_modules(kind: type[nn.RNNBase], more: dict[str, int]) -> None:
    flags = (False, True)
    torch.manual_seed(0)
    for layers, two, bias, first, steps in itertools.product((1, 3), flags, flags, flags, (1, 4)):
        model = kind(
            2, 3, num_layers=layers, bidirectional=two, bias=bias, batch_first=first, dtype=DOUBLE, **more
        )  # fmt: skip
        x = draw(SIZE, steps, 2)
        batch = x[:, None] if first else x[:, :, None]  # the transform sees a batch of one inside
        expected = flatten(model(x if first else x.transpose(0, 1)))
        actual = outputs_of(model, (batch,), keep_batch_dim=False)
        assert len(actual) == len(expected)
        for index, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            rows = wanted if index == 0 and first else wanted.transpose(0, 1)
            torch.testing.assert_close(got.reshape(rows.shape), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_input_without_batch_axis(kind: type[nn.RNNBase], batch_first: bool) -> None:
    model = kind(2, 3, batch_first=batch_first, bidirectional=True, dtype=DOUBLE)
    x = draw(SIZE, STEPS, 2)
    expected = [flatten(model(row)) for row in x]
    for index, got in enumerate(outputs_of(model, (x,), keep_batch_dim=False)):
        wanted = torch.stack([outputs[index] for outputs in expected])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_batch_dim", [False, True])
def test_cells(kind: type[nn.RNNCellBase], bias: bool, keep_batch_dim: bool) -> None:
    model = kind(2, 3, bias=bias, dtype=DOUBLE)
    x = draw(SIZE, 2)
    options = {"keep_batch_dim": keep_batch_dim}
    actual = outputs_of(model, (x,), **options)
    for got, wanted in zip(actual, flatten(model(x)), strict=True):
        torch.testing.assert_close(got.reshape(wanted.shape), wanted, rtol=0, atol=1e-12)


def test_cell_with_relu() -> None:
    model = nn.RNNCell(2, 3, nonlinearity="relu", dtype=DOUBLE)
    x = draw(SIZE, 2)
    (got,) = outputs_of(model, (x,))
    torch.testing.assert_close(got[:, 0], model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_lowers_a_sequence(kind: type[nn.RNNBase]) -> None:
    model = kind(4, 5, batch_first=True)
    x = torch.randn(SIZE, STEPS, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, *_ = outputs_of(model, (x,))
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got[:, 0].float(), model(x)[0], rtol=0.05, atol=0.05)


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be_written_to(kind: type[nn.RNNBase]) -> None:
    model = kind(2, 3, num_layers=2, batch_first=True, dtype=DOUBLE)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        outputs = flatten(model(x))
        for output in outputs:
            output.mul_(2).add_(1)
        return score(*outputs)

    assert_exact(model, (draw(SIZE, STEPS, 2),), loss)


def test_weight_norm_on_a_recurrent_weight() -> None:
    model = nn.GRU(2, 3, batch_first=True, dtype=DOUBLE)
    weight_norm(model, "weight_hh_l0")
    assert_exact(model, (draw(SIZE, STEPS, 2),), lambda m, x: score(*flatten(m(x))))


def test_gradient_inside_the_loss() -> None:
    """A gradient penalty: no rule runs below a second transform, the definition does."""
    model = nn.LSTM(2, 3, batch_first=True, dtype=DOUBLE)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        def summed(x: Tensor) -> Tensor:
            return score(*flatten(model(x)))

        return summed(x) + torch.func.grad(summed)(x).square().sum()

    assert_exact(model, (draw(SIZE, STEPS, 2),), loss)


class Learned(nn.Module):
    """An LSTM whose initial state is learned, its weights in a list of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(2, 3, num_layers=2, batch_first=True, dtype=DOUBLE)
        self.h, self.c = nn.Parameter(draw(2, 1, 3)), nn.Parameter(draw(2, 1, 3))

    def forward(self, x: Tensor) -> Any:
        start = tuple(state.expand(-1, len(x), -1).contiguous() for state in (self.h, self.c))
        return self.inner(x, start)


@pytest.mark.parametrize("strategy", ["auto", "kept", "ghost"])
def test_learned_initial_state(strategy: str) -> None:
    batch = (draw(5, STEPS, 2),)
    assert_exact(
        Learned(),
        batch,
        lambda m, x: score(*flatten(m(x))),
        performance=Performance(strategy=strategy),
        microbatch_size=2,
    )


def test_original_in_the_flat_list_is_recorded_under_its_name() -> None:
    """``nn.LSTM`` keeps its parameters in a list as well, which a swap of its attributes does not reach."""
    params, x = flat_weights("lstm"), draw(SIZE, STEPS, 2)
    originals = list(params.values())

    def run(flat: list[Tensor], x: Tensor) -> Tensor:
        return score(*torch.lstm(x, zeros("lstm", 1, 1), flat, True, 1, 0.0, True, False, True))

    cached = clipgrad.clipped_grad(lambda params, x: run(originals, x), max_grad_norm=0.5)
    passed = clipgrad.clipped_grad(lambda p, x: run(list(p.values()), x), max_grad_norm=0.5)
    torch.testing.assert_close(cached(params, x).grads, passed(params, x).grads)


# ---------------------------------------------------------------- dropout


def dropped(randomness: str, x: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.GRU(2, 8, num_layers=2, batch_first=True, dropout=0.5, dtype=DOUBLE)
    output, last = outputs_of(model, (x,), performance=Performance(randomness=randomness))
    return output, last


def test_dropout_gives_each_sample_a_mask() -> None:
    output, _ = dropped("different", draw(1, STEPS, 2).expand(SIZE, -1, -1))
    assert not torch.equal(output[0], output[1])


def test_dropout_may_be_the_same() -> None:
    output, _ = dropped("same", draw(1, STEPS, 2).expand(SIZE, -1, -1))
    torch.testing.assert_close(output[0], output[1])
    assert not torch.equal(output, dropped("different", draw(SIZE, STEPS, 2))[0])


def test_dropout_may_be_forbidden() -> None:
    with pytest.raises(clipgrad.errors.NotPerSampleError, match=r'randomness="error"'):
        dropped("error", draw(SIZE, STEPS, 2))


def test_dropout_is_off_in_eval_mode() -> None:
    model = nn.LSTM(2, 3, num_layers=2, dropout=0.5, batch_first=True, dtype=DOUBLE).eval()
    assert_exact(model, (draw(SIZE, STEPS, 2),), lambda m, x: score(*flatten(m(x))))


def test_dropout_is_exact() -> None:
    """A single sample draws the very mask that PyTorch draws."""
    model = nn.LSTM(2, 3, num_layers=3, dropout=0.5, batch_first=True, dtype=DOUBLE)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return score(*flatten(model(x)))

    assert_exact(model, (draw(1, STEPS, 2),), loss)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_refused(kind: type[nn.RNNBase]) -> None:
    model = kind(2, 3, batch_first=True, dtype=DOUBLE)

    def packs(params: dict[str, Tensor], x: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, length, batch_first=True)
        return score(*flatten(functional_call(model, params, (packed,))[0].data))

    def packed(params: dict[str, Tensor], x: Tensor, length: Tensor) -> Tensor:
        data = PackedSequence(x[0], torch.ones(STEPS, dtype=torch.long))
        return score(functional_call(model, params, (data,))[0].data)

    for loss in (packs, packed):
        with pytest.raises(
            clipgrad.errors.NotPerSampleError, match=r"packed sequence.* Pad instead"
        ):
            clipgrad.clipped_grad(loss, max_grad_norm=1.0)(
                parameters(model), draw(SIZE, STEPS, 2), torch.arange(1, SIZE + 1)
            )


def test_weight_from_outside_is_refused_unless_it_is_a_constant() -> None:
    params, x = flat_weights("gru"), draw(SIZE, STEPS, 2)
    outside = draw(12, 4).requires_grad_()

    def loss(params: dict[str, Tensor], x: Tensor, frozen: bool) -> Tensor:
        flat = list(params.values())
        with torch.set_grad_enabled(not frozen):
            target = torch.gru(
                x, zeros("gru", 1, 1), [flat[0], outside, *flat[2:]], True, 1, 0.0, True, False, True
            )  # fmt: skip
        return score(*target, params["w_ih0>"])

    gradient = clipgrad.clipped_grad(loss, max_grad_norm=1.0, batch_argnums=1)
    with pytest.raises(clipgrad.errors.EscapedParameterError, match=r"w_hh, shape \(12, 4\)"):
        gradient(params, x, False)
    assert not gradient(params, x, True).grads["w_hh0>"].any()


def test_state_of_too_few_rows_is_refused() -> None:
    params = flat_weights("rnn_tanh")

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        start, flat = zeros("rnn_tanh", 1, 1), list(params.values())
        return score(*torch.rnn_tanh(x[0], start, flat, True, 1, 0.0, True, False, True))

    with pytest.raises(ValueError, match="an initial state for 3 sequences and an input of 6"):
        clipgrad.clipped_grad(loss, max_grad_norm=1.0)(params, draw(SIZE, 2, STEPS, 2))


def test_bias_that_is_broadcast_over_the_gates() -> None:
    """``torch.lstm`` accepts it; its gradient is a sum over the gates."""
    lstm = nn.LSTM(SIZE, 2).double()
    params = parameters(lstm) | {"bias_ih_l0": torch.randn(1, dtype=DOUBLE)}
    names = list(parameters(lstm))

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        start = x.new_zeros(1, 1, 2)
        weights = [params[name] for name in names]
        y, _, _ = torch.lstm(x, (start, start), weights, True, 1, 0.0, True, False, True)
        return y.square().sum()

    x = torch.randn(3, STEPS, SIZE, dtype=DOUBLE)
    result = clipgrad.clipped_grad(loss, max_grad_norm=0.5)(params, x)
    rows = []
    for index in range(len(x)):
        own = {name: param.detach().requires_grad_() for name, param in params.items()}
        rows.append(torch.autograd.grad(loss(own, x[index : index + 1]), list(own.values())))
    stacked = {
        name: torch.stack(parts)
        for name, parts in zip(params, zip(*rows, strict=True), strict=True)
    }
    sums, norms = oracle.clipped_sum(stacked, 0.5)
    for name in names:
        torch.testing.assert_close(result.grads[name], sums[name], rtol=0, atol=1e-9)
    torch.testing.assert_close(result.grad_norms, norms, rtol=0, atol=1e-9)
