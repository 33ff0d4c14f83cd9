"""Models and batches that clipgrad refuses: state across samples, hooks, TorchScript, batches out of shape."""

from __future__ import annotations

import gc
import threading
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, clipped_grad
from clipgrad.errors import NotPerSampleError
from tests.dp_tools import data, mlp, picture, private, squared


class Stateful(nn.Module):
    """A layer, some state, and a function that changes the state in forward."""

    def __init__(self, change: Callable[[Any, Tensor], Any], buffer: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(4, 2).double(), change
        self.register_buffer("state", buffer)
        self.plain = torch.zeros(4, dtype=torch.float64)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return self.layer(x)


def zeros() -> Tensor:
    return torch.zeros(4, dtype=torch.float64)


BUFFERS: dict[str, tuple[Callable[[Any, Tensor], Any], Tensor | None]] = {
    "counted": (lambda m, x: m.state.add_(1), zeros()),
    "replaced": (lambda m, x: setattr(m, "state", m.state + 1), zeros()),
    "replaced by data": (lambda m, x: setattr(m, "state", x.mean(0)), zeros()),
    "filled for the first time": (lambda m, x: setattr(m, "state", x.mean(0)), None),
    "made in forward": (lambda m, x: m.register_buffer("fresh", x.mean(0)), None),
    "made in a layer without": (lambda m, x: m.layer.register_buffer("fresh", x.mean(0)), None),
    "deleted": (lambda m, x: m._buffers.pop("state"), zeros()),
}


@pytest.mark.parametrize("name", list(BUFFERS))
def test_buffers(name: str) -> None:
    model = Stateful(*BUFFERS[name])
    before = picture(model)
    with pytest.raises(NotPerSampleError, match=r"wrote to its buffer '(state|fresh)'.*eval mode"):
        private(model).backward(data())
    if name != "counted":  # what is written cannot be taken back, but it was no sample's value
        assert picture(model) == before


def test_a_buffer_of_a_module_put_in_later() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    model.append(Stateful(lambda m, x: setattr(m, "state", m.state + 1), zeros()))
    model[3].layer = nn.Identity()
    with pytest.raises(NotPerSampleError, match="Stateful wrote to its buffer 'state'"):
        optimizer.backward(data())


def test_a_constant_made_in_forward_is_allowed() -> None:
    def cache(module: Any, x: Tensor) -> None:
        assert module.state is None
        module.register_buffer("fresh", torch.arange(4.0))
        module.state = torch.ones(3)

    model = Stateful(cache)
    before = picture(model)
    optimizer = private(model, microbatch_size=2)
    optimizer.backward(data())
    optimizer.backward(data())
    assert picture(model) == before


STATES: dict[str, Callable[[Any, Tensor], Any]] = {
    "running mean": lambda m, x: setattr(m, "plain", 0.9 * m.plain + x[0].detach()),
    "memory bank": lambda m, x: m.kept.append(sum(m.kept, start=x.detach())),
    "last input": lambda m, x: m.kept.append(x * m.kept[-1] if m.kept else x),
}


@pytest.mark.parametrize("name", list(STATES))
def test_values_of_an_earlier_batch(name: str) -> None:
    # Lane i of the old batch would silently meet sample i of the new one.
    optimizer = private(Stateful(STATES[name]))
    optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match=r"kept from an earlier batch.*Compute it anew"):
        optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match="kept from an earlier batch or microbatch"):
        private(Stateful(STATES[name]), microbatch_size=2).backward(data())


def doubled(x: Tensor) -> Tensor:
    return 2.0 * x


def shared(x: Tensor) -> Tensor:
    return x.square().sum()


# What no operation returns.
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "class": lambda x: x.as_subclass(Tensor),
    "tensor": torch.Tensor,
    "script": doubled,
    "vmap": torch.vmap(shared),
    "grad": torch.func.grad(shared),
    "jvp": lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
    "vjp": lambda x: torch.func.vjp(torch.sin, x)[0],
    "functionalize": torch.func.functionalize(torch.sin),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("collects", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("name", list(MADE))
def test_values_of_an_earlier_batch_that_no_operation_returned(
    name: str, microbatch_size: int | None, collects: bool
) -> None:
    box: dict[str, Tensor] = {}
    make = torch.jit.script(doubled) if name == "script" else MADE[name]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found = squared(model, x)
        if "kept" in box:
            found = found * box["kept"].sum()
        box["kept"] = make(x)
        if collects:
            gc.collect()  # which moves what it finds to the oldest generation
        return found

    optimizer = private(mlp(), loss, microbatch_size=microbatch_size)
    if microbatch_size is None:
        optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match="kept from an earlier batch or microbatch"):
        optimizer.backward(data())


def test_a_loss_that_keeps_values_later_is_found_later() -> None:
    box: dict[str, Tensor] = {}
    passes: list[int] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        scale = box["kept"].sum() if "kept" in box else 1.0
        passes.append(len(passes) + 1)
        if passes[-1] >= 3:
            box["kept"] = nn.Parameter(x, requires_grad=False)
        return squared(model, x) * scale

    optimizer = private(mlp(), loss)
    while len(passes) < 4:
        optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match="kept from an earlier batch"):
        optimizer.backward(data())


def test_passes_of_other_threads_are_left_alone() -> None:
    """The values of a pass that runs in another thread are alive, but not kept."""
    inside, ended = threading.Event(), threading.Event()

    def slow(model: nn.Module, x: Tensor) -> Tensor:
        made = nn.Parameter(model(x).detach(), requires_grad=False)
        inside.set()
        assert ended.wait(60)
        return (model(x) * made).sum()

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(lambda: private(mlp(), slow).backward(data()))
        assert inside.wait(60)
        private(mlp()).backward(data())
        ended.set()
        running.result()


def test_values_of_a_batch_that_failed() -> None:
    kept: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model(x)
        if not kept:
            kept.append(h.detach())
            raise MemoryError
        return (h - kept[0]).square().sum()

    optimizer = private(mlp(), loss)
    with pytest.raises(MemoryError):
        optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match="kept from an earlier batch"):
        optimizer.backward(data())


def test_values_of_an_earlier_batch_inside_of_a_transform() -> None:
    kept: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model(x)
        difference = torch.func.vmap(torch.sub)(h, kept[-1]) if kept else h
        kept.append(h * 1)
        return difference.square().sum()

    optimizer = private(mlp(), loss)
    optimizer.backward(data())
    with pytest.raises(NotPerSampleError, match="kept from an earlier batch"):
        optimizer.backward(data())


def test_keeping_activations_for_inspection_is_allowed() -> None:
    model = Stateful(lambda m, x: m.kept.append(x) or m.kept[0].shape)
    optimizer = private(model, microbatch_size=2)
    for _ in range(2):
        optimizer.backward(data())
    assert len(model.kept) == 6


def test_gradient_hooks() -> None:
    model = mlp()
    weight, layer = model[0].weight, model[2]
    on_parameter = r"parameter '0\.weight' has a gradient hook.*register_step_pre_hook"
    on_module = r"module '2' has a backward hook.*Remove it"
    hooks: list[tuple[Callable[..., Any], str]] = [
        (weight.register_hook, on_parameter),
        (weight.register_post_accumulate_grad_hook, on_parameter),
        (layer.register_full_backward_hook, on_module),
        (layer.register_full_backward_pre_hook, on_module),
    ]
    for register, message in hooks:
        handle = register(lambda *seen: None)
        with pytest.raises(NotPerSampleError, match=message):
            private(model)
        handle.remove()
    optimizer = private(model)
    model[1].register_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(NotPerSampleError, match="module '1' has a backward hook"):
        optimizer.backward(data())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_modules() -> None:
    scripted = torch.jit.script(nn.Linear(6, 2).double())
    model = nn.Sequential(nn.Linear(4, 6).double(), scripted)
    with pytest.raises(
        ValueError, match=r"Linear is a TorchScript module.*requires_grad_\(False\) for each"
    ):
        private(model)
    for parameter in scripted.parameters():
        parameter.requires_grad_(False)
    private(model, inner=torch.optim.SGD(model[0].parameters())).backward(data())


BATCHES: dict[str, tuple[tuple[Any, ...], str]] = {
    "none": ((), "backward needs the batch"),
    "no tensor": ((3, "x"), r"the batch holds no tensor.*first axis"),
    "scalar tensor": ((data(), torch.tensor(3.0)), r"\[1\] is a scalar tensor.*Python numbers"),
    "unequal": ((data(5), data(4)), r"disagree about the batch size \(\[0\]: 5, \[1\]: 4\)"),
    "unequal in a dict": (({"a": data(5), "b": data(4)},), r"\['a'\]: 5, .*\['b'\]: 4"),
    "numpy": ((data(), np.zeros(5)), r"ndarray, not a tensor.*torch\.as_tensor"),
    "mapping in a mapping": (
        ({"x": data(), "more": UserDict(a=data())},),
        r"\['more'\] is UserDict, not a tensor.*dict\(batch\)",
    ),
    "mapping in a list": (([data(), UserDict(a=data())],), r"\[0\]\[1\] is UserDict, not a tensor"),
    "unknown object": (
        (data(), SimpleNamespace(a=data())),
        r"\[1\] is SimpleNamespace, not a tensor",
    ),
    "subclass of dict in a tuple": (
        (data(), (type("Batch", (dict,), {})(a=data()),)),
        r"\[1\]\[0\] is Batch, not a",
    ),
    "unequal in a mapping": (
        (data(5), UserDict(a=data(4))),
        r"\[0\]: 5, \[1\]\['a'\]: 4",
    ),
    "labels in a mapping": (
        (data(), UserDict(label=[0, 1, 0, 1, 1])),
        r"list of 5 Python values \(0, \.\.\.\)",
    ),
    "list of labels": ((data(), [0, 1, 0, 1, 1]), r"list of 5 Python values.*torch\.as_tensor"),
    "list of names": (
        (data(), list("abcde")),
        r"list of 5 Python values \('a', \.\.\.\)",
    ),
    "list of names in an inner mapping": (
        (data(), {"more": {"name": list("abcde")}}),
        r"list of 5 Python values \('a', \.\.\.\)",
    ),
    "list of targets": (
        (data(), [(1.0, 2.0), [3.0, 4.0], {"x": 5.0}, (6.0,), ["seven"]]),
        r"list of 5 Python values \(\(1\.0, 2\.0\), \.\.\.\)",
    ),
    "requires grad": ((data().requires_grad_(),), r"requires grad.*inside loss_fn, or detach"),
    "computed outside": ((mlp()[0](data()),), r"shape \(5, 6\) that requires grad"),
}


@pytest.mark.parametrize("name", list(BATCHES))
def test_batches(name: str) -> None:
    batch, message = BATCHES[name]
    optimizer = private(mlp(), lambda model, x, *rest: squared(model, x))
    with pytest.raises(ValueError, match=message):
        optimizer.backward(*batch)


def test_lists_of_constants_are_allowed() -> None:
    optimizer = private(mlp(), lambda model, x, *rest: squared(model, x))
    optimizer.backward(data(5), [1, 2], ("a",), {"sizes": [1, 2, 3]})
    optimizer.backward(data(1), ["its own"])
    optimizer.backward(data(5), None, torch.float32, np.float64(3), nn.Sequential(), str)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.zeros(5),
            r"is_padding must be a boolean tensor of shape \(5,\), got torch\.float32",
        ),
        (torch.zeros(4, dtype=torch.bool), r"of shape \(4,\)"),
        (torch.zeros(5, 1, dtype=torch.bool), r"of shape \(5, 1\)"),
        ([False] * 5, r"of shape \(5,\), got list\. Convert it with torch\.as_tensor"),
        (np.zeros(5, dtype=bool), r"got ndarray\. Convert it"),
    ],
)
def test_padding_masks(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private(mlp()).backward(data(), is_padding=mask)


def test_parameters_of_the_wrong_kind() -> None:
    weight = torch.ones(4, dtype=torch.float64)
    gradient = clipped_grad(lambda p, x: (p["a"] * x).sum(), max_grad_norm=1.0)
    for wrong, message in (
        ({"a": weight, "b": weight}, r"'b' and 'a' are the same tensor.*pass a tied weight once"),
        ({"a": weight, "n": torch.ones(2, dtype=torch.long)}, r"'n' is torch\.int64.*Close over"),
        ({"a": weight, "n": 3}, r"leaf 'n' is int"),
        ({}, "params holds no tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient(wrong, data())
    model = nn.Sequential(nn.Linear(4, 2).double())
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex128)))
    with pytest.raises(ValueError, match=r"'phase' is torch\.complex128"):
        private(model).backward(data())


def test_lazy_modules_say_that_they_wait_for_a_first_batch() -> None:
    model = nn.LazyLinear(2)
    with pytest.raises((ValueError, RuntimeError), match="dummy batch"):
        private(model).backward(data())


def test_data_parallel_wrapper_is_refused() -> None:
    model = nn.DataParallel(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"DataParallel.*Pass the bare module \(model\.module\)"):
        DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            lambda model, x: model(x).sum(),
            max_grad_norm=1.0,
            noise_multiplier=0.0,
            expected_batch_size=1,
        )
