"""The parameters to train are searched again whenever the model or the optimizer has changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipgrad import DPOptimizer
from clipgrad.optimizer.parameters import TrainedParameters
from tests.dp_tools import data, private, sgd


class Model(nn.Module):
    """This model has one example of everything that the search reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4, track_running_stats=False).eval()
        self.recurrent = nn.RNN(4, 2)
        self.rest = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.second(self.first(x).tanh()))
        x = self.recurrent(x[None])[0][0]
        for module in self.rest:
            x = module(x)
        return x


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def fresh(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.5, dtype=torch.float64))


def rename(model: Model, owned: Any) -> None:
    model._modules["other"] = model._modules.pop("rest")
    model.forward = lambda x: model.other[0](x[:, :2])  # type: ignore[method-assign, assignment, operator, index]


def reorder(table: dict[str, Any]) -> None:
    first = next(iter(table))
    table[first] = table.pop(first)


def replace_owned(model: Model, owned: Any) -> None:
    parameter = fresh(4)
    model.first.bias = parameter
    index = next(i for i, p in enumerate(owned[0]["params"]) if p.shape == (4,))
    owned[0]["params"][index] = parameter


Owned = list[dict[str, Any]]
CHANGES: dict[str, Callable[[Model, Owned], Any]] = {
    "frozen": lambda m, o: m.first.weight.requires_grad_(False),
    "unfrozen": lambda m, o: m.frozen.requires_grad_(True),
    "parameter replaced": lambda m, o: setattr(m.first, "bias", fresh(4)),
    "parameter and optimizer's replaced": replace_owned,
    "parameter removed": lambda m, o: setattr(m.second, "bias", None),
    "parameter added": lambda m, o: setattr(m.first, "more", fresh(2)),
    "parameter added to the optimizer too": lambda m, o: (
        setattr(m.first, "more", fresh(2)), o[0]["params"].append(m.first.more)
    ),
    "parameter moved": lambda m, o: setattr(m.rest[1], "bias", m.rest[0]._parameters.pop("bias")),
    "parameters tied": lambda m, o: setattr(m.second, "weight", m.first.weight),
    "parameters in another order": lambda m, o: reorder(m.first._parameters),
    "taken from the optimizer": lambda m, o: o[0]["params"].pop(),
    "put in twice": lambda m, o: o.append({**o[0], "params": [m.frozen.weight]}),
    "another table": lambda m, o: setattr(m.first, "_parameters", OrderedDict(m.first._parameters)),
    "module replaced": lambda m, o: setattr(m, "frozen", nn.Identity()),
    "module added": lambda m, o: m.rest.append(nn.Linear(2, 2).double()),
    "module without parameters added": lambda m, o: m.rest.append(nn.Tanh()),
    "module removed": lambda m, o: m.rest.pop(0),
    "module renamed": rename,
    "modules in another order": lambda m, o: reorder(m._modules),
    "class of a module": lambda m, o: setattr(m.first, "__class__", Doubled),
    "parametrized": lambda m, o: parametrize.register_parametrization(m.first, "weight", nn.Tanh()),
    "batch norm inserted": lambda m, o: m.rest.append(nn.BatchNorm1d(2).double()),
    "batch norm in training mode": lambda m, o: m.norm.train(),
    "backward hook": lambda m, o: m.first.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m, o: m.second.register_full_backward_pre_hook(lambda *_: None),
    "hook on a parameter": lambda m, o: m.first.weight.register_hook(lambda g: g),
    "later hook on a parameter": lambda m, o: (
        m.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    ),
    "recurrent weight replaced": lambda m, o: setattr(m.recurrent, "weight_hh_l0", fresh(2, 2)),
    "recurrent weight as a plain attribute": lambda m, o: (
        m.recurrent.__dict__.__setitem__("weight_hh_l0", fresh(2, 2))
    ),
    "recurrent weights renamed": lambda m, o: m.recurrent._flat_weights_names.reverse(),
}  # fmt: skip


def owned(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def outcome(make: Callable[[], DPOptimizer]) -> Any:
    """Return the gradients by name, or the message of the refusal."""
    try:
        optimizer = make()
        optimizer.zero_grad()
        optimizer.backward(data(3))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return optimizer.clipped_sums


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen(case: str, model: Model) -> None:
    inner = sgd(model)
    before = TrainedParameters(model, owned(inner))
    assert before.holds(model, owned(inner))
    CHANGES[case](model, inner.param_groups)
    assert not before.holds(model, owned(inner))


@pytest.mark.parametrize("case", CHANGES)
def test_after_a_change_results_equal_those_of_a_new_optimizer(case: str, model: Model) -> None:
    inner = sgd(model)
    optimizer = private(model, inner=inner)
    optimizer.backward(data(3))
    CHANGES[case](model, inner.param_groups)
    changed, new = outcome(lambda: optimizer), outcome(lambda: private(model, inner=inner))
    if isinstance(new, str):
        assert changed == new
    else:
        torch.testing.assert_close(changed, new, rtol=0, atol=0)


def test_without_a_change_there_is_no_second_search(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = private(model, noise_multiplier=0.0)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_: pytest.fail("a walk"))
    for _ in range(2):
        optimizer.backward(data(3))
        optimizer.step()
        optimizer.zero_grad()


def test_another_model_or_optimizer(model: Model) -> None:
    trained = TrainedParameters(model, owned(sgd(model)))
    assert not trained.holds(Model(), owned(sgd(model)))
    assert not trained.holds(model, owned(sgd(model))[1:])
    assert not trained.holds(model, owned(sgd(model))[::-1])


class Renaming(nn.Linear):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"my.{name}", p) for name, p in super().named_parameters(*args, **kwargs))


def test_a_module_that_overrides_a_walk_is_walked_each_time() -> None:
    own = nn.Linear(4, 2)
    own.named_modules = lambda *a, **k: nn.Module.named_modules(own, *a, **k)  # type: ignore[method-assign]
    with pytest.warns(DeprecationWarning, match="script"):
        script = nn.Sequential(torch.jit.script(nn.Tanh()), nn.Linear(4, 2))
    for model in (Renaming(4, 2), own, script):
        trained = TrainedParameters(model, owned(sgd(model)))
        assert not trained.holds(model, owned(sgd(model)))


def test_a_module_with_a_table_of_another_kind_is_walked_each_time(model: Model) -> None:
    model.first._modules = OrderedDict()
    trained = TrainedParameters(model, owned(sgd(model)))
    assert not trained.holds(model, owned(sgd(model)))


def test_another_dtype() -> None:
    """The parameters stay the same objects, but settings for their old dtype are invalid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = private(model)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        optimizer.zero_grad()
        optimizer.backward(data(3, dtype=dtype))
        sums = optimizer._pending._sums
        assert sums is not None
        assert {total.dtype for total in sums} == {torch.promote_types(dtype, torch.float32)}
        optimizer.step()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
