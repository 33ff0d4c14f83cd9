"""PyTorch's guards notice every change of a loss, except for the cases that are listed at the end."""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections import ChainMap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad.loss_graph import CannotCapture, CapturedLoss, LossCapture
from tests.loss_graph.conftest import Small, one_sample, small_loss
from tests.nightly import every

FACTOR = 1.0
TABLE = {"factor": [1.0]}
SETTINGS = types.SimpleNamespace(inner=types.SimpleNamespace(factor=1.0))
ARRAY = np.ones(2)
MADE_UP = "factor"  # not as a constant of the code that reads it


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


class WithDefault:
    factor = 1.0


class Owner:
    def __init__(self) -> None:
        self.factor = 1.0
        self.unrelated = 0

    def read(self) -> float:
        return self.factor

    def __call__(self) -> float:
        return float(getattr(self, MADE_UP))


Read, Change = Callable[[], Any], Callable[[float], Any]


def held(thing: Any) -> tuple[Read, Change]:
    return lambda: thing.factor, lambda value: setattr(thing, "factor", value)


def closure() -> tuple[Read, Change]:
    factor = 1.0

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return lambda: factor, change


def default() -> tuple[Read, Change]:
    factors = [1.0]

    def read(factors: list[float] = factors) -> float:
        return factors[0]

    return read, lambda value: factors.__setitem__(0, value)


def partial() -> tuple[Read, Change]:
    factors = {"by": [1.0]}
    read = functools.partial(lambda by: by["by"][0], factors)
    return read, lambda value: factors["by"].__setitem__(0, value)


def owner(call: bool) -> tuple[Read, Change]:
    thing = Owner()
    return thing if call else thing.read, lambda value: setattr(thing, "factor", value)


def code() -> tuple[Read, Change]:
    def read() -> float:
        return 1.0

    codes = {1.0: read.__code__, 3.0: (lambda: 3.0).__code__}
    return lambda: read(), lambda value: setattr(read, "__code__", codes[value])


def own_class() -> tuple[Read, Change]:
    kind = type("Local", (), {"factor": 1.0})
    return lambda: kind.factor, lambda value: setattr(kind, "factor", value)


PLACES: dict[str, Callable[[], tuple[Read, Change]]] = {
    "global": lambda: (lambda: FACTOR, lambda value: globals().__setitem__("FACTOR", value)),
    "container": lambda: (lambda: TABLE["factor"][0], lambda value: TABLE["factor"].__setitem__(0, value)),
    "chain of attributes": lambda: (
        lambda: SETTINGS.inner.factor, lambda value: setattr(SETTINGS.inner, "factor", value),
    ),
    "array": lambda: (lambda: torch.as_tensor(ARRAY)[0], lambda value: ARRAY.fill(value)),
    "default": default,
    "closure": closure,
    "attribute of a closure": lambda: held(types.SimpleNamespace(factor=1.0)),
    "slot": lambda: held(Slotted()),
    "attribute hiding a class's": lambda: held(WithDefault()),
    "class attribute": own_class,
    "partial": partial,
    "method": lambda: owner(False),
    "self by a made-up name": lambda: owner(True),
    "code of a function": code,
    "flag": lambda: (lambda: 3.0 if TABLE.get("flag") else 1.0, lambda value: TABLE.update(flag=value > 2)),  # type: ignore[arg-type]
}  # fmt: skip


def serving(capture: LossCapture, model: nn.Module, *args: Any) -> CapturedLoss:
    params = [p for p in model.parameters() if p.requires_grad]
    return capture.graph((model, *args), params, args)


def value_of(capture: LossCapture, model: nn.Module, *args: Any) -> Tensor:
    graph = serving(capture, model, *args)
    params = [p for p in model.parameters() if p.requires_grad]
    return graph(params, args, graph.constants)[0]


# torch 2.11 has no guard for these.
OLD_TORCH = torch.__version__.startswith("2.11")
UNSEEN_BEFORE = {"default", "class attribute"} if OLD_TORCH else set()


@pytest.mark.parametrize(
    "place", every(2, [place for place in PLACES if place not in UNSEEN_BEFORE])
)
def test_change_of_a_value_is_followed(place: str) -> None:
    read, change = PLACES[place]()
    model, one = Small(), one_sample()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return small_loss(model, x) * read()

    capture, numbers = LossCapture(loss), []
    try:
        for value in (1.0, 3.0, 1.0, 3.0):
            change(value)
            torch.testing.assert_close(
                value_of(capture, model, one), value * small_loss(model, one)
            )
            numbers.append(serving(capture, model, one).number)
    finally:
        change(1.0)
    # A graph for each, an input from the second value on, or an input.
    assert numbers in ([0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0])


def test_values_that_the_loss_does_not_read_have_no_effect() -> None:
    thing, model, one = Owner(), Small(), one_sample()
    capture = LossCapture(lambda model, x: small_loss(model, x) * thing.factor)
    for step in range(20):
        thing.unrelated = step
        assert serving(capture, model, one).number == 0


def twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


MODELS: dict[str, Callable[[Any], Any]] = {
    "eval": lambda m: m.eval(),
    "a child in eval": lambda m: m.drop.eval(),
    "dropout rate": lambda m: setattr(m.drop, "p", 1.0),
    "module replaced": lambda m: setattr(m, "drop", nn.Tanh()),
    "forward hook": lambda m: m.first.register_forward_hook(twice),
    "forward hook before": lambda m: m.last.register_forward_pre_hook(lambda s, i: (2 * i[0],)),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(
        lambda s, i, out: 2 * out if isinstance(s, nn.Linear) else None
    ),
    "forward of one module": lambda m: setattr(m.first, "forward", lambda x: 2 * F.linear(x, m.first.weight)),
    "buffer written": lambda m: m.scale.fill_(3.0),
    "buffer's data": lambda m: setattr(m.scale, "data", torch.full((), 3.0).double()),
    "buffer replaced": lambda m: setattr(m, "scale", torch.full((), 3.0).double()),
    "buffer of another dtype": lambda m: setattr(m.scale, "data", torch.full((), 3.0)),
    "tensor written": lambda m: m.held.fill_(3.0),
    "tensor replaced": lambda m: setattr(m, "held", torch.full((), 3.0).double()),
    "weights written": lambda m: m.first.weight.data.mul_(2),
    "weight replaced": lambda m: setattr(m.first, "weight", nn.Parameter(2 * m.first.weight.detach())),
    "bias gone": lambda m: setattr(m.first, "bias", None),
    "step of its own": lambda m: setattr(m, "step", lambda m, x, h: 2 * h),
    "number": lambda m: setattr(m, "factor", 3.0),
}  # fmt: skip


@pytest.mark.parametrize("case", every(2, MODELS))
def test_change_of_a_model_is_followed(case: str) -> None:
    model, one = Small(), one_sample()
    model.drop.p = 0.5 if case in ("eval", "a child in eval") else 0.0
    capture = LossCapture(small_loss)
    before = serving(capture, model, one).number, small_loss(model, one)
    handle = MODELS[case](model)
    try:
        torch.manual_seed(0)
        after = small_loss(model, one)
        torch.manual_seed(0)
        torch.testing.assert_close(value_of(capture, model, one), after, rtol=0, atol=1e-9)
        assert not torch.equal(after, before[1])
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


def test_frozen_parameters_are_followed() -> None:
    model, one = Small(), one_sample()
    capture = LossCapture(small_loss)
    assert len(serving(capture, model, one).constants) == 2
    model.first.requires_grad_(False)
    assert len(serving(capture, model, one).constants) == 4
    model.first.requires_grad_(True)
    assert serving(capture, model, one).number == 0


@pytest.mark.parametrize(
    ("enter", "leave"),
    [
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)),
    ],
    ids=["default dtype", "determinism"],
)  # fmt: skip
def test_global_settings_are_followed(enter: Any, leave: Any) -> None:
    model, one = Small(), one_sample()
    capture = LossCapture(small_loss)
    serving(capture, model, one)
    enter()
    try:
        assert serving(capture, model, one).number == 1
    finally:
        leave()
    assert serving(capture, model, one).number == 0


def test_autocast_around_the_loss_is_followed() -> None:
    model, one = Small().float(), torch.ones(1, 3)
    model.held = model.held.float()
    capture = LossCapture(small_loss)
    assert serving(capture, model, one).number == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert serving(capture, model, one).number == 1
    assert serving(capture, model, one).number == 0


UNSEEN: dict[str, Callable[[], tuple[Read, Callable[[], Any]]]] = {}


def unseen(case: Callable[[], tuple[Read, Callable[[], Any]]]) -> None:
    UNSEEN[case.__name__] = case


@unseen
def later_attribute_of_a_function() -> tuple[Read, Callable[[], Any]]:
    def other() -> None: ...

    return lambda: getattr(other, "beta", 1.0), lambda: setattr(other, "beta", 3.0)


@unseen
def attribute_of_a_partial() -> tuple[Read, Callable[[], Any]]:
    part = functools.partial(max, 1)
    return lambda: getattr(part, "beta", 1.0), lambda: setattr(part, "beta", 3.0)


@unseen
def attribute_of_a_cached_function() -> tuple[Read, Callable[[], Any]]:
    beta = functools.cache(lambda: 0.0)
    return lambda: getattr(beta, "gamma", 1.0), lambda: setattr(beta, "gamma", 3.0)


@unseen
def global_that_hides_a_builtin() -> tuple[Read, Callable[[], Any]]:
    return lambda: abs(-1.0), lambda: globals().__setitem__("abs", lambda value: 3.0)


@unseen
def attribute_that_raised_an_error() -> tuple[Read, Callable[[], Any]]:
    thing = types.SimpleNamespace()

    def read() -> float:
        with contextlib.suppress(AttributeError):
            return float(thing.later)
        return 1.0

    return read, lambda: setattr(thing, "later", 3.0)


@unseen
def class_attribute_read_by_an_instance() -> tuple[Read, Callable[[], Any]]:
    kind = type("Local", (WithDefault,), {})
    thing = kind()
    return lambda: thing.factor, lambda: setattr(kind, "factor", 3.0)


@unseen
def special_method_replaced() -> tuple[Read, Callable[[], Any]]:
    kind = type("Local", (), {"__float__": lambda self: 1.0})
    thing = kind()
    return lambda: float(thing), lambda: setattr(kind, "__float__", lambda self: 3.0)


@unseen
def special_method_that_appears() -> tuple[Read, Callable[[], Any]]:
    kind = type("Local", (), {})
    thing = kind()
    return lambda: 1.0 if thing else 3.0, lambda: setattr(kind, "__bool__", lambda self: False)


@unseen
def attribute_of_a_metaclass() -> tuple[Read, Callable[[], Any]]:
    meta = type("Meta", (type,), {"beta": 1.0})
    kind: Any = meta("Local", (), {})
    return lambda: kind.beta, lambda: setattr(meta, "beta", 3.0)


@unseen
def attribute_of_a_table() -> tuple[Read, Callable[[], Any]]:
    class Table(dict):  # type: ignore[type-arg]
        beta = 1.0

    table = Table()
    return lambda: table.beta, lambda: setattr(table, "beta", 3.0)


@unseen
def front_of_a_chain_of_maps() -> tuple[Read, Callable[[], Any]]:
    front: dict[str, float] = {}
    chain = ChainMap(front, {"beta": 1.0})
    return lambda: chain["beta"], lambda: front.update(beta=3.0)


@unseen
def method_of_a_class() -> tuple[Read, Callable[[], Any]]:
    kind = type("Local", (Owner,), {})
    thing = kind()
    return lambda: thing.read(), lambda: setattr(kind, "read", lambda self: 3.0)


@unseen
def environment_variable_that_appears() -> tuple[Read, Callable[[], Any]]:
    name = "CLIPGRAD_TEST_OF_GUARDS"
    return lambda: 3.0 if os.getenv(name) else 1.0, lambda: os.environ.__setitem__(name, "1")


@pytest.mark.skipif(OLD_TORCH, reason="the list is that of the newest torch")
@pytest.mark.parametrize("case", UNSEEN)
def test_changes_that_guards_do_not_notice(case: str) -> None:
    """``docs/guarantees.md`` must state these cases; remove a case if a new PyTorch notices it."""
    read, change = UNSEEN[case]()
    model, one = Small(), one_sample()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return small_loss(model, x) * read()

    capture = LossCapture(loss)
    try:
        before = value_of(capture, model, one)
        change()
        torch.testing.assert_close(loss(model, one), 3 * before)
        torch.testing.assert_close(value_of(capture, model, one), before)
    except CannotCapture:
        pytest.fail("PyTorch refuses it: it belongs into the tests of refusals")
    finally:
        globals().pop("abs", None)
        os.environ.pop("CLIPGRAD_TEST_OF_GUARDS", None)
