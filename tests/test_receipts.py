"""Under a plan, what is stepped on is what is accounted for: each batch of its loader once, whole, and alone."""

from __future__ import annotations

import dataclasses
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import clipgrad
from clipgrad import DPOptimizer, PrivacyPlan
from clipgrad.errors import UnaccountedBatchError
from tests.dp_tools import mlp, sgd, squared, through_a_file, values

SAMPLES = 60


def plan(**changes: Any) -> PrivacyPlan:
    usual: dict[str, Any] = {
        "num_samples": SAMPLES, "expected_batch_size": 12, "steps": 8, "delta": 1e-3,
        "noise_multiplier": 1.0, "accountant": "rdp",
    }  # fmt: skip
    return PrivacyPlan(**{**usual, **changes})


def rows(size: int = SAMPLES) -> TensorDataset:
    return TensorDataset(torch.randn(size, 4, dtype=torch.float64))


def loader_of(a_plan: PrivacyPlan, **options: Any) -> clipgrad.sampling.PrivateLoader:
    return clipgrad.poisson_loader(rows(), plan=a_plan, **options)


def optimizer_of(a_plan: PrivacyPlan) -> DPOptimizer:
    model = mlp()
    return DPOptimizer(sgd(model, lr=0.1), model, squared, plan=a_plan)


def step(optimizer: DPOptimizer, *batches: Any, **options: Any) -> None:
    for batch in batches:
        optimizer.backward(batch, **options)
    optimizer.step()
    optimizer.zero_grad()


def moved(x: Tensor) -> Tensor:
    """As ``x.to(device)``: the same values in a new tensor."""
    return x.clone()


def same(x: Tensor) -> Tensor:
    return x


HANDS = pytest.mark.parametrize("hand", [same, moved])


# ------------------------------------------------------------------------- what is accepted


@HANDS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_counted(hand: Callable[[Tensor], Tensor], workers: int) -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    for (x,) in loader_of(a_plan, num_workers=workers):
        step(optimizer, hand(x))
    assert optimizer.ledger.steps == a_plan.steps
    assert optimizer.epsilon() == a_plan.epsilon()


@HANDS
def test_one_batch_in_several_calls(hand: Callable[[Tensor], Tensor]) -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    for (x,) in loader_of(a_plan):
        step(optimizer, *(hand(part) for part in x.split(5)) if len(x) else (hand(x),))
    assert optimizer.ledger.steps == a_plan.steps


def test_a_batch_is_known_in_any_container() -> None:
    class Encoding(dict[str, Tensor]):
        """A mapping that is no pytree, such as a tokenizer returns."""

    a_plan = plan(steps=4)

    def collate(samples: list[tuple[Tensor]]) -> Any:
        x = torch.stack([sample[0] for sample in samples])
        return Encoding(x=x, more=[x + 1, {"y": x[:, 0]}])

    model = mlp()

    def loss(model: nn.Module, *batch: Any) -> Tensor:
        return squared(model, batch[0]["x"] if isinstance(batch[0], dict) else batch[0])

    optimizer = DPOptimizer(sgd(model), model, loss, plan=a_plan)
    first, second, third, _ = loader_of(a_plan, collate_fn=collate)
    for batch in ((dict(third),), (first["x"],), (second["more"][0], second["more"][1]["y"])):
        optimizer.backward(*batch)
        optimizer.step()
    with pytest.raises(UnaccountedBatchError, match="was used in a step already"):
        optimizer.backward(third["more"][0])


def test_batches_that_were_drawn_ahead_may_be_taken_in_any_order() -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    batches = [x for (x,) in loader_of(a_plan)]
    for x in reversed(batches):
        step(optimizer, x)
    assert optimizer.ledger.steps == a_plan.steps


def test_a_loop_that_fetches_ahead_and_moves() -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    waiting: list[Tensor] = []
    for (x,) in loader_of(a_plan):
        waiting.append(moved(x))
        if len(waiting) > 2:
            step(optimizer, waiting.pop(0))
    for x in waiting:
        step(optimizer, x)
    assert optimizer.ledger.steps == a_plan.steps


def test_padded_rows_do_not_count() -> None:
    a_plan = plan(max_batch_size=20, accountant="pld")
    optimizer = optimizer_of(a_plan)
    for padded in loader_of(a_plan, pad=True):
        batch, is_padding = padded
        if optimizer.ledger.steps % 2:
            step(optimizer, padded)
        else:
            step(optimizer, moved(batch[0]), is_padding=is_padding)
    with pytest.raises(UnaccountedBatchError):
        optimizer.backward(batch[0])


def test_users_shuffled_and_full_batches() -> None:
    users = plan(num_samples=20, expected_batch_size=5, unit="user")
    shuffled = plan(shuffled=True, relation="replace_special")
    full = plan(expected_batch_size=SAMPLES)
    owners = [index % 20 for index in range(SAMPLES)]
    loaders = {
        users: clipgrad.user_loader(rows(), owners, plan=users),
        shuffled: clipgrad.shuffled_loader(rows(), plan=shuffled),
        full: clipgrad.poisson_loader(rows(), plan=full),
    }
    for a_plan, loader in loaders.items():
        model = mlp()

        def loss(model: nn.Module, x: Tensor, *present: Tensor) -> Tensor:
            return squared(model, x)

        optimizer = DPOptimizer(sgd(model), model, loss, plan=a_plan)
        for batch in loader:
            optimizer.backward(*batch)
            optimizer.step()
        assert optimizer.epsilon() == a_plan.epsilon()


def test_a_declared_plan_takes_what_it_is_given() -> None:
    a_plan = plan(declared_sampling="each row by a coin, by the data service")
    optimizer = optimizer_of(a_plan)
    x = rows().tensors[0]
    for size in (7, 7, 60):
        step(optimizer, x[:size])
    assert [entry.declared for entry in optimizer.ledger.history] == [a_plan.declared_sampling]


def test_an_optimizer_without_a_plan_asks_for_no_receipts() -> None:
    model = mlp()
    optimizer = DPOptimizer(
        sgd(model), model, squared, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=12
    )
    for (x,) in loader_of(plan()):
        step(optimizer, x, x)


# ------------------------------------------------------------------------- what is refused


@HANDS
def test_two_batches_in_one_step(hand: Callable[[Tensor], Tensor]) -> None:
    """What a trainer does with ``gradient_accumulation_steps=2``."""
    a_plan = plan()
    optimizer, batches = optimizer_of(a_plan), iter(loader_of(a_plan))
    (x,), (y,) = next(batches), next(batches)
    before = values(optimizer.model)
    optimizer.backward(hand(x))
    with pytest.raises(UnaccountedBatchError, match=r"One batch of the loader is one step"):
        optimizer.backward(hand(y))
    optimizer.zero_grad()
    with pytest.raises(UnaccountedBatchError, match=r"One batch of the loader is one step"):
        optimizer.backward(torch.cat([x, y]))
    optimizer.zero_grad()
    assert optimizer.ledger.steps == 0
    assert all(torch.equal(before[name], now) for name, now in values(optimizer.model).items())
    step(optimizer, x)  # the refused calls spent nothing


@HANDS
def test_one_batch_in_two_steps(hand: Callable[[Tensor], Tensor]) -> None:
    a_plan = plan()
    optimizer, batches = optimizer_of(a_plan), iter(loader_of(a_plan))
    (x,) = next(batches)
    step(optimizer, hand(x))
    with pytest.raises(
        UnaccountedBatchError, match=r"used in a step already|step was taken already"
    ):
        optimizer.backward(hand(x))


@HANDS
@pytest.mark.parametrize("interleaved", [True, False])
def test_two_optimizers_on_one_batch(hand: Callable[[Tensor], Tensor], interleaved: bool) -> None:
    """Matrices by one, vectors by another: each of them would count only its own half."""
    a_plan = plan()
    model = mlp()
    parts = [[p for p in model.parameters() if p.dim() == dim] for dim in (2, 1)]
    one, two = (DPOptimizer(sgd(nn.ParameterList(p)), model, squared, plan=a_plan) for p in parts)
    (x,) = next(iter(loader_of(a_plan)))
    assert one.ledger is two.ledger
    if interleaved:
        one.backward(hand(x))
        two.backward(hand(x))
        one.step()
        with pytest.raises(UnaccountedBatchError):
            two.step()
    else:
        step(one, hand(x))
        with pytest.raises(UnaccountedBatchError):
            two.backward(hand(x))
    assert one.ledger.steps == 1


def test_two_optimizers_on_batches_of_their_own_share_the_budget() -> None:
    a_plan = plan()
    one, two = optimizer_of(a_plan), optimizer_of(a_plan)
    for index, (x,) in enumerate(loader_of(a_plan)):
        step((one, two)[index % 2], x)
    assert one.epsilon() == two.epsilon() == a_plan.epsilon()
    (x,) = next(iter(loader_of(a_plan)))
    for optimizer in (one, two):
        optimizer.backward(x)
        with pytest.raises(clipgrad.errors.PrivacyBudgetError, match="all 8 steps"):
            optimizer.step()
        optimizer.zero_grad()


def test_a_plan_that_continues_another_ledger_is_another_run() -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    other = clipgrad.accounting.Ledger(accountant="rdp")
    again = a_plan.continuing(other)
    assert optimizer_of(again).ledger is other
    assert optimizer.ledger is not other
    (x,) = next(iter(loader_of(again)))
    with pytest.raises(UnaccountedBatchError, match="no loader of this plan made"):
        optimizer.backward(x)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(rows(), batch_size=12, shuffle=True),
        DataLoader(rows(), batch_size=SAMPLES),
        clipgrad.poisson_loader(rows(), expected_batch_size=12),
        loader_of(plan()),
    ],
    ids=["shuffled", "full batch", "Poisson without the plan", "of an equal plan"],
)
@pytest.mark.parametrize("own_loader_too", [True, False])
def test_batches_of_another_loader(loader: Any, own_loader_too: bool) -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    if own_loader_too:
        for (x,) in loader_of(a_plan):
            step(optimizer, x)
    (x,) = next(iter(loader))
    with pytest.raises(UnaccountedBatchError, match=r"no loader of this plan made.*poisson_loader"):
        optimizer.backward(x)


def test_more_rows_than_were_drawn() -> None:
    a_plan = plan(num_samples=1000, expected_batch_size=10, delta=1e-4)
    optimizer = optimizer_of(a_plan)
    data = rows(1000)
    (x,) = next(iter(clipgrad.poisson_loader(data, plan=a_plan)))
    with pytest.raises(UnaccountedBatchError, match=rf"100 rows.* made batches of {len(x)} rows"):
        optimizer.backward(data.tensors[0][:100])
    with pytest.raises(
        UnaccountedBatchError, match=rf"{2 * len(x)} rows of batch 0.* has {len(x)}"
    ):
        optimizer.backward((x, torch.cat([x, x]))[::-1])


@HANDS
def test_a_part_of_a_batch(hand: Callable[[Tensor], Tensor]) -> None:
    a_plan = plan(expected_batch_size=30)
    optimizer = optimizer_of(a_plan)
    (x,) = next(iter(loader_of(a_plan)))
    part = hand(x)[:-1]
    optimizer.backward(part)
    with pytest.raises(UnaccountedBatchError, match=r"^step: .*rows|^a logical batch of"):
        optimizer.step()
    optimizer.backward(hand(x)[-1:])
    optimizer.step()


def test_the_time_axis_first_is_noticed() -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    (x,) = next(iter(loader_of(a_plan)))
    with pytest.raises(UnaccountedBatchError, match="sample axis must come first"):
        optimizer.backward(x.new_zeros(50, len(x), 4))


def test_rows_of_two_batches_in_one_call() -> None:
    a_plan = plan()
    optimizer, batches = optimizer_of(a_plan), iter(loader_of(a_plan))
    (x,), (y,) = next(batches), next(batches)
    with pytest.raises(
        UnaccountedBatchError, match="several batches of the loader, numbers 0 and 1"
    ):
        optimizer.backward(x, y)


@HANDS
def test_an_empty_batch_that_is_left_out(hand: Callable[[Tensor], Tensor]) -> None:
    """That would tell that it was empty; it is drawn as every other and gets its noise."""
    a_plan = plan(expected_batch_size=1.0, steps=60)
    optimizer = optimizer_of(a_plan)
    left_out = False
    for (x,) in loader_of(a_plan):
        if len(x) == 0:
            left_out = True
            del x
            continue
        optimizer.backward(hand(x))
        if left_out:
            with pytest.raises(UnaccountedBatchError, match="was empty, and no step was taken"):
                optimizer.step()
            return
        optimizer.step()
    pytest.fail("of 60 batches of one sample on average none was empty")


def test_batches_of_an_iteration_that_was_left() -> None:
    a_plan = plan()
    optimizer, loader = optimizer_of(a_plan), loader_of(a_plan)
    (x,) = next(iter(loader))
    (y,) = next(iter(loader))
    with pytest.raises(UnaccountedBatchError, match="its iteration has ended"):
        optimizer.backward(x)
    step(optimizer, y)


def test_a_batch_that_is_refused_by_the_loss_is_not_spent() -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    (x,) = next(iter(loader_of(a_plan)))
    right = optimizer.loss_fn
    optimizer.loss_fn = lambda model, x: model(x)
    with pytest.raises(clipgrad.errors.NotPerSampleError):
        optimizer.backward(x)
    optimizer.loss_fn = right
    step(optimizer, x)


# ------------------------------------------------------------------------- how receipts are kept


def test_a_tensor_that_is_in_several_batches_tells_nothing() -> None:
    positions = torch.arange(3)
    a_plan = plan()

    def collate(samples: list[tuple[Tensor]]) -> Any:
        return torch.stack([sample[0] for sample in samples]), positions

    model = mlp()

    def loss(model: nn.Module, x: Tensor, constant: tuple[Any, ...]) -> Tensor:
        return squared(model, x)

    optimizer = DPOptimizer(sgd(model), model, loss, plan=a_plan)
    loader = clipgrad.sampling.PrivateLoader(
        rows(), clipgrad.sampling.PoissonSampler(SAMPLES, sample_rate=0.5, steps=8, whole_run=True),
        collate_fn=collate, receipts=a_plan.run.receipts,
    )  # fmt: skip
    batches = list(loader)
    assert a_plan.run.receipts._receipt_of(positions) is None
    for x, _ in batches:
        step_on(optimizer, x)
    assert optimizer.ledger.steps == 8


def step_on(optimizer: DPOptimizer, x: Tensor) -> None:
    optimizer.backward(x, ())
    optimizer.step()


def test_nothing_is_kept_of_batches_that_are_gone() -> None:
    a_plan = plan(steps=50)
    optimizer = optimizer_of(a_plan)
    for (x,) in loader_of(a_plan):
        step(optimizer, x)
    del x
    gc.collect()
    assert a_plan.run.receipts._known == {}
    assert a_plan.run.receipts._unspent == {}


def test_receipts_do_not_leave_the_process() -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    (x,) = next(iter(loader_of(a_plan)))
    other = pickle.loads(pickle.dumps(a_plan))
    assert other == a_plan
    assert other.run.receipts._unspent == {}
    assert dataclasses.replace(a_plan).run is not a_plan.run
    step(optimizer, x)


def test_a_resumed_run_goes_on_where_it_was() -> None:
    a_plan = plan()
    optimizer, loader = optimizer_of(a_plan), loader_of(a_plan)
    for index, (x,) in enumerate(loader):
        step(optimizer, x)
        if index == 2:
            break
    states = through_a_file((optimizer.state_dict(), loader.state_dict()))
    later = dataclasses.replace(a_plan)
    optimizer, loader = optimizer_of(later), loader_of(later)
    optimizer.load_state_dict(states[0])
    loader.load_state_dict(states[1])
    for (x,) in loader:
        step(optimizer, x)
    assert optimizer.ledger.steps == a_plan.steps
    assert optimizer.epsilon() == a_plan.epsilon()


# ------------------------------------------------------------------------- shuffled batches: passes are counted


def shuffled(**changes: Any) -> PrivacyPlan:
    """Five batches a pass."""
    usual = {"shuffled": True, "relation": "replace_special", "steps": 10, "accountant": "pld"}
    return plan(**{**usual, **changes})


def passes(count: int) -> float:
    ledger = clipgrad.accounting.Ledger(relation="replace_special")
    ledger.record(1.0, clipgrad.accounting.FullBatch(), count)
    return ledger.epsilon(1e-3)


@HANDS
def test_a_shuffled_batch_cannot_be_left_out(hand: Callable[[Tensor], Tensor]) -> None:
    """Five steps on every second batch reach into two passes; two were told as one."""
    a_plan = shuffled()
    optimizer, batches = optimizer_of(a_plan), clipgrad.shuffled_loader(rows(), plan=a_plan)
    first, _, third, *_ = (x for (x,) in batches)
    step(optimizer, hand(first))
    optimizer.backward(third)
    with pytest.raises(UnaccountedBatchError, match="batch 1 of the shuffled loader was left out"):
        optimizer.step()


def test_a_shuffled_loader_that_starts_again_begins_another_pass() -> None:
    a_plan = shuffled()
    optimizer, loader = optimizer_of(a_plan), clipgrad.shuffled_loader(rows(), plan=a_plan)
    for count in (1, 2, 3):
        (x,) = next(iter(loader))
        step(optimizer, x)
        assert optimizer.epsilon() == pytest.approx(passes(count))


def test_the_passes_of_two_shuffled_plans_do_not_continue_one_another() -> None:
    one = shuffled(steps=2)
    first = optimizer_of(one)
    two = shuffled(steps=3).continuing(first.ledger)
    second = optimizer_of(two)
    for a_plan, optimizer in ((one, first), (two, second)):
        for (x,) in clipgrad.shuffled_loader(rows(), plan=a_plan):
            step(optimizer, x)
    assert first.epsilon() == second.epsilon() == pytest.approx(passes(2))
    again = clipgrad.accounting.Ledger(relation="replace_special")
    again.load_state_dict(through_a_file(first.ledger.state_dict()))
    assert again.history == first.ledger.history


def test_a_schedule_is_one_optimizers() -> None:
    """The second one would begin with the noise of step 0 again."""
    a_plan = plan(noise_multiplier=lambda step: 0.5 + step)
    one, two = optimizer_of(a_plan), optimizer_of(a_plan)
    batches = iter(loader_of(a_plan))
    step(one, next(batches)[0])
    two.backward(next(batches)[0])
    with pytest.raises(clipgrad.errors.PrivacyBudgetError, match="noise is a function of the step"):
        two.step()


def test_empty_batches_that_are_kept_and_left_out() -> None:
    a_plan = plan(expected_batch_size=1.0, steps=60)
    optimizer = optimizer_of(a_plan)
    batches = [x for (x,) in loader_of(a_plan)]
    first = next(index for index, x in enumerate(batches) if len(x) == 0)
    for x in batches[:first]:
        step(optimizer, x)
    later = next(x for x in batches[first:] if len(x))
    optimizer.backward(later)
    with pytest.raises(UnaccountedBatchError, match=f"batch {first} of the loader was empty"):
        optimizer.step()


def test_a_state_of_another_run_does_not_reset_the_count() -> None:
    a_plan = plan(steps=2)
    optimizer = optimizer_of(a_plan)
    other_plan = dataclasses.replace(a_plan)
    model = mlp()
    other = DPOptimizer(
        sgd(model),
        model,
        squared,
        plan=other_plan.continuing(optimizer.ledger),
    )
    for (x,) in loader_of(a_plan):
        step(optimizer, x)
    with pytest.raises(ValueError, match="of another run, but 2 steps of this plan were taken"):
        optimizer.load_state_dict(through_a_file(other.state_dict()))


@pytest.mark.parametrize("kind", ["dictionary", "tensor"])
def test_padded_batches_of_any_kind(kind: str) -> None:
    a_plan = plan(max_batch_size=20, accountant="pld")

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> Any:
            x = torch.full((4,), float(index), dtype=torch.float64)
            return x if kind == "tensor" else {"x": x}

    model = mlp()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squared(model, batch if kind == "tensor" else batch["x"])

    optimizer = DPOptimizer(sgd(model), model, loss, plan=a_plan)
    for padded in clipgrad.poisson_loader(Rows(), plan=a_plan, pad=True):
        step(optimizer, padded)
    assert optimizer.ledger.steps == a_plan.steps


@pytest.mark.parametrize("wrong", [5, {"steps": 3}])
def test_a_plan_that_is_none(wrong: Any) -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"plan must be a clipgrad\.PrivacyPlan"):
        DPOptimizer(sgd(model), model, squared, plan=wrong)
    with pytest.raises(TypeError, match=r"plan must be a clipgrad\.PrivacyPlan"):
        clipgrad.poisson_loader(rows(), plan=wrong)


@pytest.mark.parametrize("wrong", [True, 5, b"coins", ["coins"], ""])
def test_a_declaration_is_a_text(wrong: Any) -> None:
    with pytest.raises(ValueError, match="declared_sampling must be a text"):
        plan(declared_sampling=wrong)


def test_a_mask_that_is_none() -> None:
    a_plan = plan()
    optimizer = optimizer_of(a_plan)
    (x,) = next(iter(loader_of(a_plan)))
    with pytest.raises(ValueError, match="is_padding"):
        optimizer.backward(x, is_padding=[False] * len(x))
