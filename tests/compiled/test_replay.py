"""Recorded steps, on the CPU: the recorder is a stand-in that runs the graph again, on the memory of its recording.

Between replays that memory holds nonsense, so what is read from it without a replay shows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import symbolic_trace

from clipgrad import DPOptimizer, clipped_grad
from clipgrad.clipping import make_clipping
from clipgrad.compiled import compiler as compiler_module
from clipgrad.compiled import fixed_size, runner
from clipgrad.compiled.cuda_graphs import Common, Replay, recordable
from clipgrad.compiled.eager import EagerStep
from clipgrad.compiled.lengths import Lengths, shapes_of
from clipgrad.compiled.shape import recorded_sizes
from clipgrad.compiled.trace import TracedStep, trace
from clipgrad.engine.captured_loss import LossGraphs
from clipgrad.engine.clip_and_sum import Settings
from clipgrad.engine.copies import copies
from clipgrad.engine.inputs import inputs_of_arguments
from clipgrad.errors import CompileMismatchError
from clipgrad.options import Options
from clipgrad.ranks import OneProcess
from tests.architectures import ARCHITECTURES
from tests.compiled.conftest import Graphs, Recorder
from tests.compiled.test_exact import check
from tests.nightly import every
from tests.oracle import clipped_sum, per_sample_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


@pytest.mark.parametrize(
    "name",
    every(5, ["autocast", "cnn_channels_last", "lora", "sinusoidal_buffer", "tied_embedding"]),
)
def test_architecture(name: str, graphs: Graphs, recorders: list[Recorder]) -> None:
    check(ARCHITECTURES[name], graphs)
    assert [recorder.replays for recorder in recorders] == [3]  # one as a proof


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).double()


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def private(model: nn.Module, lr: float = 0.0, **options: Any) -> DPOptimizer:
    options = {"noise_multiplier": 0.0, "expected_batch_size": 1, **options}
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr), model, loss_fn, max_grad_norm=0.5, compile=True, **options
    )  # fmt: skip


def data(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, dtype=torch.float64), torch.randint(2, (rows,))


def test_nothing_that_was_returned_is_overwritten(
    graphs: Graphs, recorders: list[Recorder]
) -> None:
    model = net().eval()
    optimizer = private(model, microbatch_size=4)
    x, y = data(9)
    expected = per_sample_gradients(model, loss_fn, (x, y))
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(12):
        rows = slice(0, 1 + step % 9)
        optimizer.backward(x[rows], y[rows])
        sums, norms = clipped_sum({n: g[rows] for n, g in expected.items()}, 0.5)
        for name, total in optimizer.clipped_sums.items():
            kept.append((total, sums[name]))
        norms_found = optimizer.diagnostics.grad_norms
        assert isinstance(norms_found, Tensor)
        kept += [(norms_found, norms)]
        optimizer.zero_grad()
    for found, wanted in kept:
        torch.testing.assert_close(found, wanted)
    assert len(recorders) == len(graphs) == 1


def test_poisson_batches_have_a_recording_for_each_of_a_few_sizes(
    graphs: Graphs, recorders: list[Recorder]
) -> None:
    """All are made with the graph, before its first result."""
    model = net().eval()
    optimizer = private(model, expected_batch_size=16)
    x, y = data(60)
    expected = per_sample_gradients(model, loss_fn, (x, y))
    kept: list[tuple[Tensor, Tensor]] = []
    for size in (1, 17, 16, 24, 9, 25, 3, 17, 60, 24):
        optimizer.backward(x[:size], y[:size])
        sums, norms = clipped_sum({n: g[:size] for n, g in expected.items()}, 0.5)
        kept += [(total, sums[name]) for name, total in optimizer.clipped_sums.items()]
        found = optimizer.diagnostics.grad_norms
        assert isinstance(found, Tensor)
        kept.append((found, norms))
        optimizer.zero_grad()
    for found, wanted in kept:
        torch.testing.assert_close(found, wanted)
    assert len(graphs) == 1
    assert len(recorders) == len(recorded_sizes(fixed_size(16)))


def test_recordings_that_were_made_with_the_graph_need_no_comparison(
    graphs: Graphs, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are made later do, since parameters moved."""
    compared: list[int] = []
    eager = runner.MicrobatchRunner._eager

    def counted(self: runner.MicrobatchRunner) -> EagerStep:
        compared.append(0)
        return eager(self)

    monkeypatch.setattr(runner.MicrobatchRunner, "_eager", counted)
    model = net().eval()
    optimizer = private(model, expected_batch_size=16)
    x, y = data(24)
    for size in (24, 10, 11, 12, 13, 14, 15, 16, 17):
        optimizer.backward(x[:size], y[:size])
        optimizer.zero_grad()
    assert len(compared) == 4  # runs 1, 2, 4, 8
    for new, comparisons in ((16, 6), (20, 7)):
        model[0].weight.data = model[0].weight.data.clone()
        for size in (17, 17, new):
            optimizer.backward(x[:size], y[:size])
            optimizer.zero_grad()
        assert len(compared) == comparisons  # a moved parameter is copied from then on


def test_arguments_are_copied_after_the_last_replay(
    graphs: Graphs, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay on another stream may still read the memory that recordings share."""
    copy_of, copied = Common.copy_of, []

    def checked(self: Common, number: int, argument: Tensor) -> Tensor:
        assert recorders[-1].waited
        copied.append(number)
        return copy_of(self, number, argument)

    monkeypatch.setattr(Common, "copy_of", checked)
    optimizer = private(net().eval(), microbatch_size=4)
    optimizer.backward(*data(4))
    assert copied


def test_recordings_share_the_memory_of_their_arguments() -> None:
    """Those of fewer rows use a part of it, in the same layout."""
    common = Common()
    image = torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last)
    largest, number = common.copy_of(0, image), common.copy_of(1, torch.tensor(2.0))
    for rows in (6, 4, 1):
        found = common.copy_of(0, image[:rows])
        assert torch.equal(found, image[:rows])
        assert found.stride() == image[:rows].stride()
        assert found.data_ptr() == largest.data_ptr()
    assert common.copy_of(1, torch.tensor(3.0)).data_ptr() == number.data_ptr()
    for other in (image[:, :2].contiguous(), image.double(), image.contiguous(), image[0]):
        found = common.copy_of(0, other)
        assert torch.equal(found, other)
        assert found.stride() == other.stride()
    assert torch.equal(largest, image)


def test_sums_of_several_microbatches_and_calls_add_up(
    graphs: Graphs, recorders: list[Recorder]
) -> None:
    model = net().eval()
    optimizer = private(model, microbatch_size=2)
    x, y = data(7)
    expected, _ = clipped_sum(per_sample_gradients(model, loss_fn, (x, y)), 0.5)
    optimizer.backward(x[:5], y[:5])
    optimizer.backward(x[5:], y[5:])
    torch.testing.assert_close(optimizer.clipped_sums, expected)


def test_calls_of_one_microbatch_each_add_up(graphs: Graphs, recorders: list[Recorder]) -> None:
    """The first call's sums are lent until the second one runs."""
    model = net().eval()
    optimizer = private(model, microbatch_size=4)
    x, y = data(11)
    expected, _ = clipped_sum(per_sample_gradients(model, loss_fn, (x, y)), 0.5)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 11)):
        optimizer.backward(x[rows], y[rows])
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("noise_multiplier", every(2, [1.0, 0.0]))
def test_nobody_reaches_what_is_lent(
    noise_multiplier: float, graphs: Graphs, recorders: list[Recorder]
) -> None:
    """Not those who look at the sums, and no later replay reaches what was published."""
    model = net().eval()
    optimizer = private(model, microbatch_size=4, noise_multiplier=noise_multiplier)
    published: list[tuple[Tensor, Tensor]] = []
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(*data(4))
        lent = recorders[0]._results[: len(list(model.parameters()))]
        before = [total.clone() for total in lent]
        for shown, total in zip(optimizer.clipped_sums.values(), before, strict=True):
            torch.testing.assert_close(shown, total)
            shown.data.add_(7.0)  # leaves no trace
        optimizer.step()
        for parameter, total in zip(model.parameters(), before, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            assert torch.equal(gradient, total) == (noise_multiplier == 0)
            assert float((gradient - total).abs().max()) < 5  # noise of 0.5, and no 7
            published.append((gradient, gradient.clone()))
    assert all(torch.equal(gradient, then) for gradient, then in published)


def test_results_that_share_memory_are_not_lent() -> None:
    """Noise added to both would be one noise, added twice."""
    given, memory = torch.randn(3), torch.zeros(8)

    class Sharing(Recorder):
        def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
            self._function = function
            self._results = (
                [memory[:3], memory[3:6]] if shared else [torch.zeros(3), torch.zeros(3)]
            )
            return self._results

    Recorder.made = Sharing.made = []
    for shared in (True, False):
        replay = Replay(lambda x: [x * 2, x * 3], [False], Common(), lambda: Sharing(given.device))
        first = replay([given], uncopied=1)
        assert replay.returned_uncopied is not shared
        second = replay([given + 1], uncopied=1)
        assert torch.equal(first[0], given * 2 if shared else (given + 1) * 2)
        assert torch.equal(first[1], given * 3)
        assert torch.equal(second[0], (given + 1) * 2)


def test_a_result_that_a_replay_does_not_write_is_not_lent() -> None:
    """Noise would stay in it, and be added to. It keeps its value."""

    class Constant(Recorder):
        def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
            super().record(function)
            self._results[1].fill_(5.0)
            return self._results

        def replay(self) -> None:
            self._results[0].copy_(self._function()[0])

    Constant.made = []
    given = torch.randn(3)
    replay = Replay(lambda x: [x * 2, x], [False], Common(), lambda: Constant(given.device))
    for factor in (1, 2):
        found = replay([given * factor], uncopied=2)
        assert not replay.returned_uncopied
        assert torch.equal(found[0], given * 2 * factor)
        assert torch.equal(found[1], torch.full((3,), 5.0))


def test_a_result_that_is_an_argument_is_not_lent() -> None:
    """Noise would be added to a weight."""
    weight = torch.ones(3)

    class Returning(Recorder):
        def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
            self._function = function
            self._results = function()
            return self._results

    Returning.made = []
    replay = Replay(lambda w, x: [w[:2]], [True, False], Common(), lambda: Returning(weight.device))
    (found,) = replay([weight, torch.ones(1)], uncopied=1)
    assert not replay.returned_uncopied
    found.add_(1)
    assert torch.equal(weight, torch.ones(3))


def test_what_a_transform_returns_is_not_lent(graphs: Graphs, recorders: list[Recorder]) -> None:
    gradient = clipped_grad(
        lambda w, x: (w * x).sum(),
        max_grad_norm=1.0,
        compile=True,
        normalize_by=2.0,
        microbatch_size=3,
    )
    w, x = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    kept = [gradient(w, factor * x).grads for factor in (1.0, -1.0, 0.5)]
    for factor, found in zip((1.0, -1.0, 0.5), kept, strict=True):
        torch.testing.assert_close(found, torch.full_like(w, factor / 2))
    assert len(recorders) == 1


def scaled(factor: list[float]) -> Callable[..., Tensor]:
    """A loss that reads a Python number."""
    return lambda model, x, y: factor[0] * F.cross_entropy(model(x), y)


def test_only_a_graph_that_serves_is_replayed(graphs: Graphs, recorders: list[Recorder]) -> None:
    """Another factor, mode or trained parameter is another graph."""
    model, factor = net(), [1.0]
    model[1].p = 0.0  # draws nothing
    optimizer = private(model, microbatch_size=4)
    optimizer.loss_fn = scaled(factor)
    x, y = data(4)

    def check_against_the_oracle() -> None:
        optimizer.zero_grad()
        optimizer.backward(x, y)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        gradients = per_sample_gradients(model, optimizer.loss_fn, (x, y))
        expected, _ = clipped_sum({name: gradients[name] for name in names}, 0.5)
        torch.testing.assert_close(optimizer.clipped_sums, expected)

    for change in (1.0, 1.0, 3.0, 3.0, 1.0, 1.0):
        factor[0] = change
        check_against_the_oracle()
    model[0].weight.requires_grad_(False)
    check_against_the_oracle()
    model[0].weight.requires_grad_(True)
    check_against_the_oracle()
    x = x.float().double()[:3]
    y = y[:3]
    check_against_the_oracle()
    assert len(graphs) == len(recorders) == 3
    assert sum(recorder.replays for recorder in recorders) == 9 + len(recorders)


def test_a_loss_with_several_heads(graphs: Graphs, recorders: list[Recorder]) -> None:
    """Labels of one head are out of range for the other, so a replay of its graph would end the process on a GPU."""
    model = nn.ModuleList([nn.Linear(3, classes).double() for classes in (2, 9)])
    task = [0]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(model, nn.ModuleList)
        return F.cross_entropy(model[task[0]](x), y)

    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters()), model, loss, max_grad_norm=0.5, noise_multiplier=0.0,
        expected_batch_size=16, compile=True,
    )  # fmt: skip
    for step in range(24):
        task[0] = step % 2
        x, y = torch.randn(14, 3, dtype=torch.float64), torch.full((14,), (1, 8)[step % 2])
        optimizer.zero_grad()
        optimizer.backward(x, y)
        gradients = per_sample_gradients(model, loss, (x, y))
        torch.testing.assert_close(optimizer.clipped_sums, clipped_sum(gradients, 0.5)[0])
    assert len(graphs) == 2


def test_the_generator_of_a_loss_that_draws(graphs: Graphs, recorders: list[Recorder]) -> None:
    """A run in vain would leave the generator elsewhere than an eager step does."""
    factor = [1.0]
    model = net()
    optimizer = private(model, microbatch_size=4)
    optimizer.loss_fn = scaled(factor)
    batch = data(4)
    for change in (1.0, 1.0, 3.0, 3.0, 1.0, 1.0):
        factor[0] = change
        optimizer.zero_grad()
        optimizer.backward(*batch)
    assert len(recorders) == 2
    assert sum(recorder.replays for recorder in recorders) == 6 + len(recorders)


def graph_of(function: Callable[..., Tensor]) -> TracedStep:
    weight, rows = torch.ones(3), torch.ones(2, 3)
    inputs, _ = inputs_of_arguments(function, 0, None, (weight, rows))
    loss = LossGraphs(keep_batch_dim=True, has_aux=False).graph_for(inputs)
    settings = Settings(Options(), make_clipping(1.0, ["w"], [3]), (torch.float32,), OneProcess())
    mask, bounds = torch.zeros(2, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    return trace(inputs, loss, [rows], mask, bounds, settings, Lengths(shapes_of([rows])))


BUFFER = torch.ones(3)


def attention(x: Tensor, dropout: float) -> Tensor:
    """PyTorch says of fused attention that it draws, whatever the probability of dropout."""
    heads = x[:, None, None].expand(-1, 1, 2, -1)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropout).sum()


@torch.library.custom_op("clipgrad_tests::draws_in_secret", mutates_args=())
def draws_in_secret(x: Tensor) -> Tensor:
    return torch.rand_like(x)


@draws_in_secret.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("function", "has_no_side_effects"),
    [
        (lambda w, x: (w * x).sin().sum(), True),
        (lambda w, x: (w * x * BUFFER).sum(), True),
        (lambda w, x: (w * x).mul(2).add_(1).sum(), True),
        (lambda w, x: F.dropout(w * x).sum(), False),
        (lambda w, x: (w * x + draws_in_secret(x.detach())).sum(), False),
        (lambda w, x: attention(w * x, dropout=0.0), True),
        (lambda w, x: attention(w * x, dropout=0.5), False),
    ],
)
def test_what_may_run_for_nothing(
    function: Callable[..., Tensor], has_no_side_effects: bool
) -> None:
    assert graph_of(function).has_no_side_effects is has_no_side_effects


def test_weights_that_were_stepped_in_place_are_seen(
    graphs: Graphs, recorders: list[Recorder]
) -> None:
    model = net().eval()
    optimizer = private(model, lr=0.3, microbatch_size=4)
    x, y = data(4)
    for _ in range(5):
        optimizer.zero_grad()
        expected, _ = clipped_sum(per_sample_gradients(model, loss_fn, (x, y)), 0.5)
        optimizer.backward(x, y)
        torch.testing.assert_close(optimizer.clipped_sums, expected)
        optimizer.step()
    assert len(recorders) == 1


def test_a_weight_that_moves_is_recorded_once_more_and_copied_from_then_on(
    graphs: Graphs, recorders: list[Recorder]
) -> None:
    model = net().eval()
    optimizer = private(model, microbatch_size=4)
    x, y = data(4)
    for _ in range(5):
        optimizer.zero_grad()
        model[0].weight.data = torch.randn(4, 3, dtype=torch.float64)
        expected, _ = clipped_sum(per_sample_gradients(model, loss_fn, (x, y)), 0.5)
        optimizer.backward(x, y)
        torch.testing.assert_close(optimizer.clipped_sums, expected)
    assert len(recorders) == 2
    assert len(graphs) == 1


def test_a_new_recording_is_checked_again(
    graphs: Graphs, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net().eval()
    optimizer = private(model, microbatch_size=4)
    optimizer.backward(*data(4))
    optimizer.zero_grad()

    class Broken(Recorder):
        def replay(self) -> None:
            super().replay()
            self._results[0].mul_(1.5)

    Broken.made = []
    monkeypatch.setattr(compiler_module, "CudaRecorder", Broken)
    optimizer.backward(*data(4))  # the first recording still serves
    model[0].weight.data = model[0].weight.data.clone()
    optimizer.zero_grad()
    with pytest.raises(CompileMismatchError, match=r"0\.weight"):
        optimizer.backward(*data(4))


def test_buffers_and_globals_are_read_at_each_replay(
    graphs: Graphs, recorders: list[Recorder]
) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64)

    def loss(params: Tensor, x: Tensor) -> Tensor:
        return (params * x).sum() * scale

    gradient = clipped_grad(loss, max_grad_norm=float("inf"), compile=True)
    w, x = torch.ones(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    for factor in (2.0, 3.0, -1.0):
        scale.fill_(factor)
        torch.testing.assert_close(gradient(w, x).grads, 2 * factor * torch.ones_like(w))
    assert len(recorders) == 1


def test_dropout_draws_what_the_eager_step_draws(graphs: Graphs, recorders: list[Recorder]) -> None:
    """Recording takes a trial run, and its random numbers are nobody's loss."""
    model, (x, y) = net(), data(8)
    losses = []
    for compile in (False, True):
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=0.5, noise_multiplier=0.0,
            expected_batch_size=1, microbatch_size=4, compile=compile,
        )  # fmt: skip
        torch.manual_seed(3)
        for _ in range(4):
            optimizer.backward(x, y)
            losses.append(optimizer.diagnostics.losses)
            optimizer.zero_grad()
    assert recorders
    torch.testing.assert_close(losses[:4], losses[4:])
    assert len(torch.stack(losses[4:]).unique(dim=0)) == 4


def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once(
    graphs: Graphs,
    recorders: list[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unable(Recorder):
        def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    Unable.made = []
    monkeypatch.setattr(compiler_module, "CudaRecorder", Unable)
    model = net().eval()
    optimizer = private(model, microbatch_size=4)
    x, y = data(4)
    expected, _ = clipped_sum(per_sample_gradients(model, loss_fn, (x, y)), 0.5)
    for _ in range(3):
        optimizer.backward(x, y)
        torch.testing.assert_close(optimizer.clipped_sums, expected)
        optimizer.zero_grad()
    assert caplog.text.count("runs without CUDA graphs") == 1
    assert len(Unable.made) == 1


def test_arguments_keep_their_layout() -> None:
    """The compiled step was made for these strides."""
    given = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    seen: list[tuple[int, ...]] = []

    def run(x: Tensor) -> list[Tensor]:
        seen.append(x.stride())
        return [x * 2]

    Recorder.made = []
    replay = Replay(run, [False], Common(), lambda: Recorder(None))
    assert torch.equal(replay([given])[0], given * 2)
    assert set(seen) == {given.stride()}


def test_copies_are_exact_and_fresh() -> None:
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45])
    given = [
        special,
        special.double(),
        torch.randn(3).bfloat16(),
        torch.tensor([True, False]),
        torch.arange(3),
        torch.tensor([1 + 2j]),
    ]
    for copy, tensor in zip(copies(given), given, strict=True):
        assert copy.dtype == tensor.dtype
        assert copy.data_ptr() != tensor.data_ptr()
        assert torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8))


def test_only_what_lies_on_one_gpu_is_recorded() -> None:
    module = symbolic_trace(lambda x: x + 1)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there, here = torch.empty(2, device="cuda:0"), torch.empty(2)
    for node in module.graph.nodes:
        node.meta["val"] = there
    assert recordable(module, gpu)
    assert not recordable(module, torch.device("cuda", 1))
    assert not recordable(module, torch.device("cpu"))
    next(iter(module.graph.nodes)).meta["val"] = here  # would be computed once, and never again
    assert not recordable(module, gpu)


def test_seeds_of_attention_are_no_obstacle() -> None:
    attention = torch.ops.aten._scaled_dot_product_efficient_attention.default
    module = symbolic_trace(lambda q: operator.getitem(attention(q, q, q, None, True, 0.1), 2))
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there, seed = torch.empty(2, device="cuda:0"), torch.empty((), dtype=torch.int64)
    q, fused, item, _ = module.graph.nodes
    q.meta["val"], fused.meta["val"], item.meta["val"] = there, (there, there, seed, seed), seed
    assert recordable(module, gpu)
    item.target = operator.add
    assert not recordable(module, gpu)
