"""Mistakes that users make, one function each; ``docs/troubleshooting.md`` shows what they are told.

``python -m tests.mistakes`` writes the page's table anew.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import clipgrad
from clipgrad import DPOptimizer, PrivacyPlan, poisson_loader, shuffled_loader
from tests.dp_tools import data, mlp, private, sgd, squared

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
MISTAKES: dict[str, Callable[[], Any]] = {}


def mistake(what: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(act: Callable[[], Any]) -> Callable[[], Any]:
        MISTAKES[what] = act
        return act

    return register


def of_loss(what: str, loss: Callable[..., Any]) -> None:
    """A mistake in the loss, which shows at the first backward."""
    MISTAKES[what] = lambda: private(mlp(), loss).backward(data())


def plan_of(**options: Any) -> PrivacyPlan:
    numbers = {"num_samples": 40, "expected_batch_size": 8, "steps": 4, "delta": 1e-3}
    given = {"noise_multiplier": 1.0, "accountant": "rdp", **numbers, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PrivacyPlan(**given)


def with_plan(plan: PrivacyPlan) -> DPOptimizer[Any]:
    model = mlp()
    return DPOptimizer(sgd(model), model, squared, plan=plan)


def rows() -> TensorDataset:
    return TensorDataset(data(40))


def batches(plan: PrivacyPlan) -> Any:
    """Batches of a loader of the plan that hold a sample."""
    return (x for (x,) in poisson_loader(rows(), plan=plan) if len(x))


# ----------------------------------------------------------------------------- gradients and steps


@mistake("`loss.backward()` in place of `optimizer.backward(...)`")
def _() -> None:
    model = mlp()
    optimizer = private(model)
    squared(model, data()).backward()
    optimizer.backward(data())


@mistake("`step()` without `backward`")
def _() -> None:
    private(mlp()).step()


@mistake("`step()` of the wrapped optimizer")
def _() -> None:
    model = mlp()
    inner = sgd(model)
    optimizer = private(model, inner=inner)
    optimizer.backward(data())
    inner.step()


@mistake("a gradient that is written between `backward` and `step`")
def _() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()


@mistake("`GradScaler`")
def _() -> None:
    optimizer = private(mlp())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    optimizer.backward(data())
    scaler.step(optimizer)


@mistake("`clipped_sums` after `step`")
def _() -> None:
    optimizer = private(mlp())
    optimizer.backward(data())
    optimizer.step()
    _ = optimizer.clipped_sums


@mistake("a layer that is frozen between two `backward` of one step")
def _() -> None:
    model = mlp()
    optimizer = private(model)
    optimizer.backward(data())
    model[0].requires_grad_(False)
    optimizer.backward(data())


@mistake("`step(closure)`")
def _() -> None:
    private(mlp()).step(lambda: 0.0)  # type: ignore[arg-type]


@mistake("`backward()` on the loss that `optimizer.backward` returned")
def _() -> None:
    private(mlp()).backward(data()).backward()


@mistake("`diagnostics` before the first `backward`")
def _() -> None:
    _ = private(mlp()).diagnostics


@mistake("`epsilon()` without a plan")
def _() -> None:
    private(mlp()).epsilon()


# ---------------------------------------------------------------------------- making the optimizer


@mistake("LBFGS")
def _() -> None:
    model = mlp()
    private(model, inner=torch.optim.LBFGS(model.parameters()))


@mistake("a model that is wrapped in `DataParallel`")
def _() -> None:
    private(nn.DataParallel(mlp()))


@mistake("a criterion as `loss_fn`")
def _() -> None:
    private(mlp(), nn.MSELoss())


@mistake("a function of `torch.nn.functional` as `loss_fn`")
def _() -> None:
    private(mlp(), F.cross_entropy)


@mistake("an optimizer of another model")
def _() -> None:
    private(mlp(), inner=sgd(mlp()))


@mistake("`DPOptimizer` around a `DPOptimizer`")
def _() -> None:
    model = mlp()
    private(model, inner=private(model))


@mistake("a model that is frozen as a whole")
def _() -> None:
    private(mlp().requires_grad_(False))


@mistake("neither a plan nor the numbers")
def _() -> None:
    model = mlp()
    DPOptimizer(sgd(model), model, squared)


@mistake("a plan and a number that it says already")
def _() -> None:
    private(mlp(), plan=plan_of(), noise_multiplier=None, expected_batch_size=None)


@mistake("noise without clipping, `max_grad_norm=inf`")
def _() -> None:
    private(mlp(), max_grad_norm=float("inf"), noise_multiplier=1.0)


@mistake("a number as `noise`")
def _() -> None:
    private(mlp(), noise=1.0)


@mistake("`microbatch_size=0`")
def _() -> None:
    private(mlp(), microbatch_size=0)


@mistake("a misspelt argument")
def _() -> None:
    private(mlp(), max_norm=1.0)


@mistake("BatchNorm in training mode")
def _() -> None:
    private(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).double())


@mistake("a hook on a parameter's gradient")
def _() -> None:
    model = mlp()
    model[0].weight.register_hook(lambda gradient: gradient)
    private(model)


@mistake("a backward hook of a module")
def _() -> None:
    model = mlp()
    model[2].register_full_backward_hook(lambda *_: None)
    private(model)


# ---------------------------------------------------------------------------------------- batches


@mistake("`backward()` without the batch")
def _() -> None:
    private(mlp()).backward()


@mistake("the whole batch as one argument of a loss that takes two")
def _() -> None:
    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    private(mlp(), loss_fn).backward((data(), data()[:, :2]))


@mistake("a batch that requires grad")
def _() -> None:
    private(mlp()).backward(data().requires_grad_())


@mistake("labels as a Python list")
def _() -> None:
    private(mlp(), lambda model, x, y: squared(model, x)).backward(data(), [0, 1, 0, 1, 0])


@mistake("inputs and labels of different numbers of samples")
def _() -> None:
    private(mlp(), lambda model, x, y: squared(model, x)).backward(data(5), torch.ones(4))


@mistake("`is_padding` of another size than the batch")
def _() -> None:
    private(mlp()).backward(data(5), is_padding=torch.zeros(3, dtype=torch.bool))


@mistake("`backward` under `torch.inference_mode()`")
def _() -> None:
    with torch.inference_mode():
        private(mlp()).backward(data())


@mistake("a sparse batch")
def _() -> None:
    private(mlp()).backward(data().to_sparse())


# --------------------------------------------------------------------------------------- the loss

KEPT: list[Tensor] = []
OTHER = nn.Linear(4, 2).double()


def saved_on_cpu(m: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return squared(m, x)


def asserted(model: nn.Module, x: Tensor) -> Tensor:
    loss = squared(model, x)
    assert torch.isfinite(loss)
    return loss


of_loss("a loss of each sample in place of a scalar", lambda m, x: m(x).square().mean(1))
of_loss("a dictionary as loss", lambda m, x: {"loss": squared(m, x)})
of_loss("a loss that is detached", lambda m, x: squared(m, x).detach())
of_loss("a Python number as metric", lambda m, x: (squared(m, x), {"accuracy": 0.5}))
of_loss("`.item()` in the loss", lambda m, x: squared(m, x) * x.sum().item())
of_loss("`if` on the value of a tensor", lambda m, x: squared(m, x) if x.sum() > 0 else m(x).sum())
of_loss("`.tolist()` in the loss", lambda m, x: squared(m, x) * x.tolist()[0][0])
of_loss("a boolean index", lambda m, x: m(x)[m(x) > 0].sum())
of_loss(
    "an in-place write to a parameter", lambda m, x: m[0].weight.clamp_(-1, 1).sum() + m(x).sum()
)
of_loss("`save_on_cpu` in the loss", saved_on_cpu)
of_loss(
    "`backward()` inside of the loss", lambda m, x: (squared(m, x).backward(), squared(m, x))[1]
)
of_loss("an assertion about values in the loss", asserted)
of_loss("a layer that is not part of the model", lambda m, x: OTHER(x).sum() + squared(m, x))


@mistake("a value that the loss keeps, as `self.log` does")
def _() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found = squared(model, x)
        KEPT[:] = [found.detach()]
        return found

    private(mlp(), loss).backward(data())
    float(KEPT[0])


@mistake("a buffer that `forward` writes to")
def _() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mlp()
            self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            found: Tensor = self.layer(x)
            return found

    private(Counts()).backward(data())


# ------------------------------------------------------------------------- plans, loaders, budgets


@mistake("batches of an ordinary `DataLoader` with a plan")
def _() -> None:
    optimizer = with_plan(plan_of())
    for (x,) in DataLoader(rows(), batch_size=8, shuffle=True):
        optimizer.backward(x)


@mistake("two batches of the loader in one step")
def _() -> None:
    optimizer = with_plan(plan := plan_of())
    for x in batches(plan):
        optimizer.backward(x)


@mistake("one batch in two steps")
def _() -> None:
    optimizer = with_plan(plan := plan_of())
    x = next(iter(batches(plan)))
    for _ in range(2):
        optimizer.backward(x)
        optimizer.step()


@mistake("a part of a batch")
def _() -> None:
    plan = plan_of(expected_batch_size=40)
    optimizer = with_plan(plan)
    optimizer.backward(next(iter(batches(plan)))[:7])
    optimizer.step()


@mistake("time on the first axis")
def _() -> None:
    plan = plan_of(expected_batch_size=40)
    optimizer = with_plan(plan)
    sequences = TensorDataset(torch.randn(40, 60, 4, dtype=torch.float64))
    (x,) = next(iter(poisson_loader(sequences, plan=plan)))
    optimizer.backward(x.transpose(0, 1).contiguous())


@mistake("a step beyond the plan")
def _() -> None:
    plan = plan_of(expected_batch_size=40, steps=1)
    optimizer = with_plan(plan)
    for _ in range(2):
        optimizer.backward(next(iter(batches(plan))))
        optimizer.step()


@mistake("a plan for another number of samples")
def _() -> None:
    poisson_loader(TensorDataset(data(39)), plan=plan_of())


@mistake("a plan for users with a loader of samples")
def _() -> None:
    poisson_loader(rows(), plan=plan_of(unit="user"))


@mistake("a plan for Poisson batches with `shuffled_loader`")
def _() -> None:
    shuffled_loader(rows(), plan=plan_of())


@mistake("a batch size with a plan")
def _() -> None:
    poisson_loader(rows(), plan=plan_of(), expected_batch_size=8)


@mistake("a stream in `poisson_loader`")
def _() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(data())

    poisson_loader(Stream(), plan=plan_of())


@mistake("a `DataLoader` in `poisson_loader`")
def _() -> None:
    poisson_loader(DataLoader(rows(), batch_size=8), plan=plan_of())


@mistake("labels of all samples, from a loop's variable")
def _() -> None:
    model, plan = mlp(), plan_of(expected_batch_size=40)
    labels: list[Tensor] = []
    optimizer = DPOptimizer(
        sgd(model), model, lambda m, x: (m(x) - labels[-1]).square().mean(), plan=plan
    )
    for x, y in poisson_loader(TensorDataset(data(40), data(40)[:, :1]), plan=plan):
        labels.append(y)
        optimizer.backward(x)


@mistake("mixup in `collate_fn`")
def _() -> None:
    def mixup(rows: list[Any]) -> Tensor:
        x = torch.stack([x for (x,) in rows])
        return 0.7 * x + 0.3 * x.roll(1, 0)

    poisson_loader(rows(), plan=plan_of(), collate_fn=mixup)


@mistake("batches larger than the dataset")
def _() -> None:
    plan_of(expected_batch_size=41)


@mistake("shuffled batches towards adding or removing a sample")
def _() -> None:
    plan_of(shuffled=True)


@mistake("an infinite `target_epsilon`")
def _() -> None:
    PrivacyPlan.for_epsilon(
        float("inf"), num_samples=40, expected_batch_size=8, steps=4, delta=1e-3
    )


@mistake("steps and epochs")
def _() -> None:
    PrivacyPlan.for_epsilon(
        3.0, num_samples=40, expected_batch_size=8, steps=4, epochs=1, delta=1e-3
    )


@mistake("an ordinary optimizer's state in an optimizer with a plan")
def _() -> None:
    optimizer = with_plan(plan_of())
    optimizer.load_state_dict(optimizer.inner.state_dict())


@mistake("another `noise_multiplier` in the middle of a plan")
def _() -> None:
    with_plan(plan_of()).noise_multiplier = 0.5


# ------------------------------------------------------------------------------------- attached loops


def attached() -> Any:
    model, plan = mlp(), plan_of()
    criterion = nn.CrossEntropyLoss()
    x = next(iter(batches(plan)))
    return (*clipgrad.attach(model, sgd(model), criterion, plan=plan), x)


@mistake("a scaled loss in an attached loop")
def _() -> None:
    model, _, criterion, x = attached()
    (criterion(model(x), torch.zeros(len(x)).long()) / 4).backward()


@mistake("another criterion in an attached loop")
def _() -> None:
    model, _, _, x = attached()
    F.cross_entropy(model(x), torch.zeros(len(x)).long()).backward()


def told(what: str) -> tuple[str, str]:
    """The class of the error that a mistake ends in, and what it says; a note that clipgrad adds belongs to it."""
    try:
        MISTAKES[what]()
    except Exception as error:
        notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("clipgrad")]
        return type(error).__name__, " ".join([str(error), *notes])
    raise AssertionError(f"{what}: no error")


def row(what: str) -> tuple[str, str]:
    """The class of the error, whose section of the page has the line, and the line."""
    kind, text = told(what)
    text = re.sub(r"\s+", " ", _without_numbers(text))
    return kind, f"| {what} | {re.sub(r'([|*<]|__)', _escaped, text)} |"


def _escaped(found: re.Match[str]) -> str:
    """What Markdown would take for a column, for emphasis or for a tag."""
    return "".join(f"\\{letter}" for letter in found[0])


def sections() -> list[str]:
    """The page in parts: what stands above all headings, and a part for each heading."""
    return re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def heading(section: str) -> str:
    return section.split("\n")[0].removeprefix("## ")


def _without_numbers(text: str) -> str:
    """Numbers of rows and batches differ from run to run, and paths from machine to machine."""
    text = re.sub(r"\bof [\d, ]+(, \.\.\.)? rows", "of N rows", text)
    text = re.sub(r"\b(a (?:logical )?batch|logical batch) of \d+ rows", r"\1 of N rows", text)
    text = re.sub(r"numbers \d+ and \d+", "numbers 0 and 1", text)
    text = re.sub(r"batch \d+ of the loader", "batch N of the loader", text)
    text = re.sub(r"received \d+ rows", "received N rows", text)
    text = re.sub(r"which has \d+\.", "which has N.", text)
    text = text.replace("_.<locals>.", "")
    return re.sub(r"(/[\w.-]+)+/(\w+\.py):\d+", r"loss.py:12", text)


def write() -> None:
    """Write the table of each section anew; its heading is the class of its errors, and what stands above it stays."""
    rows = list(map(row, MISTAKES))
    parts = sections()
    for number, section in enumerate(parts):
        found = [line for kind, line in rows if kind == heading(section)]
        if found:
            above = section.split("| mistake |")[0]
            table = ["| mistake | what it says |", "|---|---|", *found]
            parts[number] = above + "\n".join(table) + "\n\n"
    PAGE.write_text("".join(parts).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
