"""Compiled steps on a GPU, CUDA graphs included. Skipped where there is none."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from torch import Tensor

from clipgrad import DPOptimizer
from clipgrad.compiled import recorder as recorder_module
from clipgrad.compiled.recorder import CudaRecorder, Pool, most_allocated
from tests.compiled.test_inductor import Net, loss_fn
from tests.oracle import clipped_sum, per_sample_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # what CUDA libraries warn of is not ours to fix
]


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_every_size_equals_the_loop_and_nothing_is_overwritten(
    mode: bool | str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Net().cuda()
    x, y = torch.randn(10, 2, 5, 5, device="cuda"), torch.randint(3, (10,), device="cuda")
    gradients = per_sample_gradients(model, loss_fn, (x, y))
    bound = float(clipped_sum(gradients, 1.0)[1].median())
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=bound,
        noise_multiplier=0.0, expected_batch_size=1, microbatch_size=4, compile=mode,
    )  # fmt: skip
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(25):
        rows = slice(0, step % 11)
        optimizer.backward(x[rows], y[rows])
        of_rows = {n: g[rows] for n, g in gradients.items()}
        sums, norms = (
            clipped_sum(of_rows, bound) if rows.stop else (zeros, torch.zeros(0, device="cuda"))
        )
        torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=1e-3, atol=1e-4)
        seen = optimizer.diagnostics.grad_norms
        assert isinstance(seen, Tensor)
        kept.append((seen, norms))
        optimizer.zero_grad()
    for seen, norms in kept:  # results of earlier runs are still theirs
        torch.testing.assert_close(seen, norms, rtol=1e-3, atol=1e-4)
    assert "without CUDA graphs" not in caplog.text


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_poisson_batches_equal_the_loop_and_share_memory(
    mode: bool | str, caplog: pytest.LogCaptureFixture
) -> None:
    """One graph serves all sizes. Its recordings overwrite each other's results, but nothing that was returned."""
    torch.manual_seed(0)
    model = Net().cuda()
    x, y = torch.randn(60, 2, 5, 5, device="cuda"), torch.randint(3, (60,), device="cuda")
    gradients = per_sample_gradients(model, loss_fn, (x, y))
    bound = float(clipped_sum(gradients, 1.0)[1].median())
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=bound,
        noise_multiplier=0.0, expected_batch_size=16, compile=mode,
    )  # fmt: skip
    gc.collect()
    before = sizes_of_pools()
    kept: list[tuple[Tensor, Tensor]] = []
    for size in (3, 17, 16, 24, 9, 25, 60, 1, 18, 20, 16, 24, 22, 14, 12):
        sums, norms = clipped_sum({n: g[:size] for n, g in gradients.items()}, bound)
        if size == 18:  # two batches of one logical batch, in recordings of two sizes
            optimizer.backward(x[:5], y[:5])
            optimizer.backward(x[5:18], y[5:18])
        else:
            optimizer.backward(x[:size], y[:size])
            seen = optimizer.diagnostics.grad_norms
            assert isinstance(seen, Tensor)
            kept.append((seen, norms))
        for name, total in optimizer.clipped_sums.items():
            kept.append((total, sums[name]))
        optimizer.zero_grad()
    for found, wanted in kept:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert "without CUDA graphs" not in caplog.text
    assert caplog.text.count("clipgrad: compiled in") == 1
    pools = sizes_of_pools() - before - Counter({(0, 0): 1 << 40})
    assert len(pools) == (mode is not True)


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_dropout_and_weights_move_on(mode: bool | str) -> None:
    torch.manual_seed(0)
    model = Net().cuda()
    model.drop.p = 0.5
    x, y = torch.randn(8, 2, 5, 5, device="cuda"), torch.randint(3, (8,), device="cuda")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, max_grad_norm=1.0,
        noise_multiplier=0.0, expected_batch_size=8, microbatch_size=8, compile=mode,
    )  # fmt: skip
    losses = []
    for _ in range(20):
        optimizer.backward(x, y)
        losses.append(optimizer.diagnostics.losses)
        optimizer.zero_grad()  # the weights stay: only the masks differ
    assert len(torch.stack(losses).unique(dim=0)) == 20
    model.drop.eval()
    first = optimizer.backward(x, y)
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        last = optimizer.backward(x, y)
    assert float(last) < float(first)


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_a_sample_that_is_not_finite(mode: bool | str) -> None:
    torch.manual_seed(0)
    model = Net().cuda()
    x, y = torch.randn(6, 2, 5, 5, device="cuda"), torch.randint(3, (6,), device="cuda")
    x[2] = torch.nan
    keep = [0, 1, 3, 4, 5]
    gradients = per_sample_gradients(model, loss_fn, (x[keep], y[keep]))
    expected, _ = clipped_sum(gradients, 0.5)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=0.5,
        noise_multiplier=0.0, expected_batch_size=1, microbatch_size=4, compile=mode,
    )  # fmt: skip
    for _ in range(3):
        optimizer.backward(x, y)
        assert optimizer.diagnostics.num_nonfinite == 1
        torch.testing.assert_close(optimizer.clipped_sums, expected, rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()


def test_weights_that_move_and_streams_that_change() -> None:
    """A recording reads parameters where they were; elsewhere it has to follow them."""
    torch.manual_seed(0)
    model = Net().cuda()
    x, y = torch.randn(4, 2, 5, 5, device="cuda"), torch.randint(3, (4,), device="cuda")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=0.5,
        noise_multiplier=0.0, expected_batch_size=1, microbatch_size=4, compile="reduce-overhead",
    )  # fmt: skip
    for step in range(8):
        if step in (3, 5):
            model.head.weight.data = torch.randn_like(model.head.weight)
        with torch.no_grad():
            model.conv.weight.mul_(1.1)
        expected, _ = clipped_sum(per_sample_gradients(model, loss_fn, (x, y)), 0.5)
        stream = torch.cuda.Stream() if step % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.zero_grad()
            optimizer.backward(x, y)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(optimizer.clipped_sums, expected, rtol=1e-3, atol=1e-4)


def loss_of_two_kinds(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss is another graph in evaluation."""
    return loss_fn(model, x, y) if model.training else 2 * loss_fn(model, x, y)


def sizes_of_pools() -> Counter[tuple[int, int]]:
    """Bytes of each pool that PyTorch has taken from the device."""
    sizes: Counter[tuple[int, int]] = Counter()
    torch.cuda.empty_cache()
    for segment in torch.cuda.memory._snapshot()["segments"]:
        sizes[tuple(segment["segment_pool_id"])] += segment["total_size"]
    return sizes


def test_recordings_of_one_loss_share_memory_and_follow_each_other() -> None:
    """What a recording returned is right after another one ran in the same memory, on another stream."""
    torch.manual_seed(0)
    model = Net().cuda()
    x, y = torch.randn(4, 2, 5, 5, device="cuda"), torch.randint(3, (4,), device="cuda")
    expected: dict[str, Tensor] = {
        name: torch.zeros_like(p) for name, p in model.named_parameters()
    }
    for training in (True, False):
        model.train(training)
        gradients = per_sample_gradients(model, loss_of_two_kinds, (x, y))
        for name, total in clipped_sum(gradients, 0.5)[0].items():
            expected[name] += total
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_of_two_kinds, max_grad_norm=0.5,
        noise_multiplier=0.0, expected_batch_size=1, microbatch_size=4, compile="reduce-overhead",
    )  # fmt: skip
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    gc.collect()
    before = sizes_of_pools()
    for step in range(24):
        for number in (0, 1):
            stream = streams[number]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model.train(number == step % 2)
                optimizer.backward(x, y)
            torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(optimizer.clipped_sums, expected, rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()
    assert len(sizes_of_pools() - before - Counter({(0, 0): 1 << 40})) == 1


def test_recordings_take_little_more_memory_than_their_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each tensor is larger than those before, of which eight are needed at a time."""

    def work() -> list[Tensor]:
        tensors = []
        for number in range(40):
            tensors.append(torch.ones((1 << 22) + number * (1 << 17), device="cuda"))
            tensors[-1] += sum(tensor[number] for tensor in tensors)
            tensors = tensors[-8:]
        return tensors[-1:]

    def recorded(times: int) -> int:
        pool = Pool(device)
        recorders = [CudaRecorder(pool) for _ in range(times)]
        results = [recorder.record(work)[0] for recorder in recorders]
        for recorder, result in zip(recorders, results, strict=True):
            recorder.wait()
            recorder.replay()
            torch.testing.assert_close(result, work()[0])
        recorders.clear()  # a result keeps the memory of its recording
        torch.testing.assert_close(results[-1], work()[0])
        return sizes_of_pools()[tuple(pool.memory.id)]

    device = torch.device("cuda", torch.cuda.current_device())
    most = most_allocated(work, device)
    in_one_piece = recorded(1)
    assert recorded(2) < 1.1 * in_one_piece
    monkeypatch.setattr(recorder_module, "take_at_once", lambda size, device: None)
    assert most <= in_one_piece < 0.7 * recorded(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recording_keeps_the_workspaces_of_its_products(dtype: torch.dtype) -> None:
    """A step that ``torch.compile`` records makes PyTorch free all workspaces of cuBLAS."""
    device = torch.device("cuda", torch.cuda.current_device())
    # Products with long sums and few results are divided, and the parts are kept in a workspace.
    sizes = [(64, 1 << 16, 64), (32, 1 << 15, 128), (8, 1 << 17, 8), (1, 1 << 16, 256)]
    factors = [
        (torch.randn(n, k, device=device, dtype=dtype), torch.randn(k, m, device=device, dtype=dtype))
        for n, k, m in sizes
    ]  # fmt: skip

    def work() -> list[Tensor]:
        return [left @ right for left, right in factors]

    expected = work()
    recorder = CudaRecorder(Pool(device))
    results = recorder.record(work)
    recorded = torch.compile(lambda t: t.relu() @ t, mode="reduce-overhead")
    for _ in range(3):
        recorded(torch.ones(8, 8, device=device))
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), 7.0, device=device) for _ in range(64)]
    for _ in range(3):
        recorder.wait()
        recorder.replay()
    torch.cuda.synchronize()
    assert all(bool((other == 7).all()) for other in others)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-3, atol=1.0)
