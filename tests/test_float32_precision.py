"""The precision of float32 products: what is read, what is set, and that it is put back as it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from clipgrad.compiled.check import rounding
from clipgrad.kernels import float32_precision
from clipgrad.kernels.float32_precision import (
    allows_bfloat16,
    convolution_product,
    full_product,
    full_vecdot,
    precision,
    precisions,
    product_rounding,
    set_precision,
)
from tests.float32_settings import SETTINGS, all_reads, own_settings, setting

BFLOAT16, TF32 = 2.0**-7, 2.0**-10
# Of the CPU and of CUDA, where cuDNN's convolutions may use TF32 by default.
ROUNDING = {
    "default": (0.0, TF32),
    "highest": (0.0, TF32),
    "medium": (BFLOAT16, TF32),
    "high": (TF32, TF32),
    "mkldnn bf16": (BFLOAT16, TF32),
    "backends bf16": (BFLOAT16, TF32),
    "backends tf32": (TF32, TF32),
    "all of mkldnn bf16": (BFLOAT16, TF32),
    "convolutions bf16": (BFLOAT16, TF32),
    "cuda tf32": (0.0, TF32),
    "cudnn ieee": (0.0, 0.0),
    "explicit and inherited": (BFLOAT16, TF32),
    "ieee": (0.0, TF32),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rounding(name: str) -> None:
    with setting(name):
        assert (product_rounding("cpu"), product_rounding("cuda")) == ROUNDING[name]
        on_any_device = {"medium", "backends bf16", "explicit and inherited"}
        assert allows_bfloat16() is (name in on_any_device)
        assert product_rounding("meta") == 0.0
        assert precision("meta") == "ieee"


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
def test_the_setting_is_put_back(name: str, device: str, wanted: str) -> None:
    """Also by an operation that raises, and where it was inherited or equal to what would be inherited."""
    a = torch.randn(2, 3, 4)
    with setting(name):
        reads, own = all_reads(), own_settings()
        with set_precision(device, wanted):
            assert precision(device) == wanted
            with set_precision(device, "ieee"):
                assert precision(device) == "ieee"
            assert precision(device) == wanted
        assert (all_reads(), own_settings()) == (reads, own)
        torch.testing.assert_close(
            float32_precision.bmm(a, a.mT, wanted), a @ a.mT, rtol=2e-2, atol=2e-2
        )
        with pytest.raises(RuntimeError):
            float32_precision.bmm(a, a, wanted)
        assert (all_reads(), own_settings()) == (reads, own)


def test_a_device_without_settings() -> None:
    with set_precision("meta", "tf32"):
        assert precision("meta") == "ieee"


def test_settings_are_of_the_process() -> None:
    """PyTorch computes in other threads too, so a setting of one thread alone would not do."""
    seen = []
    with setting("medium"), set_precision("cpu", "ieee"):
        read = torch._C._get_fp32_precision_getter
        thread = threading.Thread(target=lambda: seen.append(read("mkldnn", "matmul")))
        thread.start()
        thread.join()
    assert seen == ["ieee"]


@pytest.mark.parametrize(
    ("convolutions", "products", "expected"),
    [
        ("tf32", "ieee", "tf32"), ("ieee", "tf32", "tf32"), ("none", "none", "ieee"),
        ("tf32", "tf32", "tf32"),
    ],
)  # fmt: skip
def test_products_for_convolutions_on_cuda(convolutions: str, products: str, expected: str) -> None:
    with setting("default"):
        torch._C._set_fp32_precision_setter("cuda", "conv", convolutions)
        torch._C._set_fp32_precision_setter("cuda", "matmul", products)
        assert float32_precision._precision_for_convolutions("cuda") == expected
        assert float32_precision._precision_for_convolutions("cpu") == "ieee"


@pytest.mark.parametrize("name", ["default", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graphs_hold_the_setting_only_where_it_matters(name: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 20, 30, dtype=dtype), torch.randn(2, 30, 20, dtype=dtype)

    def products(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return full_product(a, b), full_vecdot(a, b.mT), convolution_product(a, b)

    with setting(name):
        graph = make_fx(products, tracing_mode="symbolic")(a, b)
    targets = {str(node.target) for node in graph.graph.nodes}
    ours = {"clipgrad.bmm.default", "clipgrad.full_vecdot.default"}
    assert targets & ours == (ours if name == "medium" and dtype is torch.float32 else set())
    with setting("medium"):
        found = graph(a, b)[:2]
    if name == "medium":
        expected = (a @ b, torch.linalg.vecdot(a, b.mT))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_step_may_differ_by_what_products_round() -> None:
    graph = make_fx(lambda a: a @ a)(torch.randn(3, 3))
    found = []
    for name in ("default", "high", "medium"):
        with setting(name):
            found.append(rounding(graph, torch.device("cpu")))
    assert [each.slack for each in found] == [1e-3, 1e-2, 1e-1]
    assert [each.step for each in found[1:]] == [TF32, BFLOAT16]


def _in_thread(
    device: str, wanted: str
) -> tuple[threading.Thread, threading.Event, threading.Event]:
    """A thread that holds a precision from the first event on until the second is set."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with set_precision(device, wanted):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    return thread, inside, leave


@pytest.mark.parametrize("name", ["medium", "backends bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
def test_a_thread_that_sets_a_precision_waits_for_another(
    name: str, device: str, wanted: str
) -> None:
    """Convolutions want TF32 on CUDA, and norms want none. The thread that leaves first would undo the other's."""
    if wanted == "tf32" and device == "cpu":
        pytest.skip("nobody sets TF32 on the CPU")
    with setting(name):
        reads = all_reads()
        with set_precision(device, "ieee"):
            thread, inside, leave = _in_thread(device, wanted)
            assert not inside.wait(0.1)
            assert precision(device) == "ieee"
        assert inside.wait(60)
        leave.set()
        thread.join()
        assert all_reads() == reads


def test_what_the_process_allows_is_not_what_another_thread_has_set() -> None:
    found = []

    def read() -> None:
        found.append((product_rounding("cpu"), precisions("cpu"), allows_bfloat16()))

    with setting("medium"):
        read()
        with set_precision("cpu", "ieee"):
            thread = threading.Thread(target=read)
            thread.start()
            thread.join(0.1)
            assert len(found) == 1
        thread.join()
    assert found[0] == found[1]
    assert found[0][0] == BFLOAT16


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_starts_when_no_thread_has_set_a_precision() -> None:
    with setting("medium"):
        thread, inside, leave = _in_thread("cpu", "ieee")
        assert inside.wait(60)
        timer = threading.Timer(0.1, leave.set)
        timer.start()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            before = precision("cpu")
            with set_precision("cpu", "ieee"):
                os._exit(0 if (before, precision("cpu")) == ("bf16", "ieee") else 1)
        thread.join()
        timer.join()
        assert os.waitpid(child, 0)[1] == 0
