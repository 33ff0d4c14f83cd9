"""Test that ``DPTrainer`` trains as ``DPOptimizer`` does, and that it refuses arguments that it cannot follow."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgrad
from clipgrad import DPOptimizer, PrivacyPlan
from clipgrad.errors import PrivacyBudgetError, UnclippedGradientError
from tests.dp_tools import plan_of
from tests.integrations import language
from tests.integrations.language import gpt2, llama, lora, model_loss, texts, together

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from clipgrad.integrations import _transfer  # noqa: E402
from clipgrad.integrations._huggingface_arguments import _is_same  # noqa: E402
from clipgrad.integrations._huggingface_logs import FiniteLosses  # noqa: E402
from clipgrad.integrations.huggingface import DPTrainer  # noqa: E402
from tests.nightly import chosen, every, rows  # noqa: E402

NORM = 0.5
# PEFT asks transformers for a name that it is about to drop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",
    "ignore:`is_gradient_checkpointing:FutureWarning",
)
Trained = dict[str, Tensor]


def arguments(folder: Path, **options: Any) -> Any:
    defaults = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "learning_rate": 1.0,
        "lr_scheduler_type": "constant", "optim": "sgd", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def trained(model: nn.Module) -> Trained:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def by_hand(model: nn.Module, steps: int, *, norm: float = NORM, masks: bool = False) -> Trained:
    """Train by a plain loop with a slow oracle: the clipped sum over all rows, divided by 12."""
    rows = texts(masks=masks)
    for _ in range(steps):
        sums = language.clipped(model, rows, norm)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in sums:
                    parameter -= sums[name] / 12
    return trained(model)


def assert_close(one: Trained, other: Trained) -> None:
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "gpt2 with LoRA": lambda: lora(gpt2(), ["c_attn"], fan_in_fan_out=True),
    "llama with LoRA": lambda: lora(llama(), ["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("name", chosen(MODELS, {"llama with LoRA"}))
def test_the_trainer_takes_the_steps_of_a_slow_loop(name: str, tmp_path: Path) -> None:
    if "LoRA" in name:
        pytest.importorskip("peft")
    model, norm = MODELS[name](), 0.05 if "LoRA" in name else NORM
    expected = by_hand(copy.deepcopy(model), 2, norm=norm, masks=True)
    before = trained(model)
    trainer = DPTrainer(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=texts(masks=True),
        plan=plan_of(2, max_grad_norm=norm),
    )
    trainer.train()
    assert_close(trained(model), expected)
    assert all(not torch.equal(value, before[n]) for n, value in trained(model).items())
    assert trainer.ledger.steps == 2


@pytest.mark.parametrize(("each", "pieces"), rows(4, [(5, 3), (12, 1), (4, 3), (1, 12)]))
def test_pieces_are_one_logical_batch(each: int, pieces: int, tmp_path: Path) -> None:
    model = gpt2()
    expected = by_hand(copy.deepcopy(model), 3)
    args = arguments(
        tmp_path, per_device_train_batch_size=each, gradient_accumulation_steps=pieces, max_steps=3
    )
    trainer = DPTrainer(model, args, train_dataset=texts(), plan=plan_of(3))
    trainer.train()
    assert_close(trained(model), expected)
    assert (trainer.state.global_step, trainer.ledger.steps) == (3, 3)


@pytest.mark.parametrize("name", chosen(["gpt2", "llama with LoRA"], {"gpt2"}))
def test_activation_checkpoints_change_nothing(name: str, tmp_path: Path) -> None:
    if "LoRA" in name:
        pytest.importorskip("peft")
    model, norm = MODELS[name](), 0.05 if "LoRA" in name else NORM
    expected = by_hand(copy.deepcopy(model), 1, norm=norm)
    args = arguments(tmp_path, max_steps=1, activation_checkpointing=True)
    plan = plan_of(1, max_grad_norm=norm)
    DPTrainer(model, args, train_dataset=texts(), plan=plan).train()
    assert_close(trained(model), expected)


class Stop(Exception):
    """This error stops a training in the middle, as a kill would."""


def stops_after(step: int) -> Any:
    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Stop

    return Stops()


def small_plan(steps: int = 7, **options: Any) -> PrivacyPlan:
    """Poisson batches of 4 of 12 samples have three steps in an epoch."""
    return plan_of(steps, **{"expected_batch_size": 4, "noise_multiplier": 1.0, **options})


def small(folder: Path, **options: Any) -> Any:
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return arguments(folder, **{**defaults, **options})


def test_poisson_batches_over_several_epochs_and_what_is_logged(tmp_path: Path) -> None:
    plan = small_plan()
    seen: list[int] = []

    class Counting(DPTrainer):
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
            seen.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *rest)

    trainer = Counting(gpt2(), small(tmp_path, max_steps=7), train_dataset=texts(), plan=plan)
    trainer.train()
    assert (trainer.state.global_step, trainer.ledger.steps, len(seen)) == (7, 7, 14)
    assert len({seen[i] + seen[i + 1] for i in range(0, 14, 2)}) > 1  # no batches of a fixed size
    assert trainer.epsilon() == pytest.approx(plan.epsilon(), rel=1e-9)
    steps = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert [log["epsilon"] for log in steps] == pytest.approx(
        [plan.epsilon(k) for k in range(1, 8)]
    )
    assert [log["epoch"] for log in steps] == pytest.approx([k / 3 for k in range(1, 8)])
    # Noise of one norm in each of some 1000 coordinates, over a sum of at most 12 norms of 0.5: noise is what is seen.
    count = sum(value.numel() for value in trained(trainer.model).values())
    typical = NORM * math.sqrt(count) / 4
    assert all(0.7 * typical < log["noised_grad_norm"] < 2 * typical for log in steps)
    for log in trainer.state.log_history:
        assert not {"loss", "grad_norm", "train_loss"} & log.keys()
    assert all(math.isfinite(log["loss_not_private"]) for log in steps)
    assert trainer.state.total_flos == 0


def test_the_logged_loss_is_the_mean_of_the_step(tmp_path: Path) -> None:
    model = gpt2()
    with torch.no_grad():
        each = [float(model_loss(model, together([row]))) for row in texts()]
    args = arguments(
        tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=3, max_steps=1
    )
    trainer = DPTrainer(model, args, train_dataset=texts(), plan=plan_of(1))
    trainer.train()
    assert trainer.state.log_history[0]["loss_not_private"] == pytest.approx(
        sum(each) / 12, rel=1e-6
    )


@pytest.mark.parametrize("stop", every(2, [4, 3]))
def test_resume_within_an_epoch_keeps_the_ledger(stop: int, tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7, "optim": "adamw_torch"}
    first = DPTrainer(
        gpt2(), small(tmp_path, **args), train_dataset=texts(), plan=small_plan(),
        callbacks=[stops_after(stop + 1)],
    )  # fmt: skip
    with pytest.raises(Stop):
        first.train()
    again = DPTrainer(gpt2(), small(tmp_path, **args), train_dataset=texts(), plan=small_plan())
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, again.ledger.steps) == (7, 7)
    assert again.state.epoch == pytest.approx(7 / 3)
    assert again.epsilon() == pytest.approx(small_plan().epsilon(), rel=1e-9)
    with pytest.raises(PrivacyBudgetError, match="all 7 steps of the plan were taken"):
        again.train()


@pytest.mark.nightly
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Without noise and with all samples in each batch, a resumed run equals an uninterrupted one."""
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch",
        "lr_scheduler_type": "linear", "learning_rate": 0.01,
    }  # fmt: skip
    whole, first, second = gpt2(), gpt2(), gpt2()
    DPTrainer(
        whole, arguments(tmp_path / "whole", **options), train_dataset=texts(), plan=plan_of(4)
    ).train()
    args = arguments(tmp_path / "parts", **options)
    with pytest.raises(Stop):
        DPTrainer(
            first, args, train_dataset=texts(), plan=plan_of(4), callbacks=[stops_after(3)]
        ).train()
    resumed = DPTrainer(second, args, train_dataset=texts(), plan=plan_of(4))
    resumed.train(resume_from_checkpoint=True)
    assert_close(trained(second), trained(whole))
    assert resumed.ledger.steps == 4


def test_a_checkpoint_without_its_ledger_is_refused(tmp_path: Path) -> None:
    args = small(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, save_only_model=True)
    DPTrainer(gpt2(), args, train_dataset=texts(), plan=small_plan()).train()
    (tmp_path / "checkpoint-4/optimizer.pt").unlink(missing_ok=True)
    again = DPTrainer(gpt2(), args, train_dataset=texts(), plan=small_plan())
    with pytest.raises(
        PrivacyBudgetError, match=r"step 2, but holds 0 steps of the ledger.*save_only_model=False"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_target_epsilon_takes_the_rest_from_the_arguments(tmp_path: Path) -> None:
    args = small(tmp_path, num_train_epochs=2, max_grad_norm=0.3)
    trainer = DPTrainer(
        gpt2(), args, train_dataset=texts(), eval_dataset=texts(4, seed=3), target_epsilon=5.0, delta=1e-2
    )  # fmt: skip
    plan = trainer.plan
    assert (plan.num_samples, plan.expected_batch_size, plan.steps) == (12, 4, 6)
    assert (plan.max_grad_norm, plan.unit) == (0.3, "sample")
    trainer.train()
    assert trainer.state.global_step == trainer.ledger.steps == 6
    assert trainer.epsilon() == pytest.approx(plan.epsilon())
    assert 4.8 < trainer.epsilon() <= 5.0
    usual = transformers.Trainer(trainer.model, args, eval_dataset=texts(4, seed=3))
    assert trainer.evaluate()["eval_loss"] == usual.evaluate()["eval_loss"]


def test_users_are_clipped_as_a_whole(tmp_path: Path) -> None:
    """Five authors have two or three texts each; a text that only fills up an author has no label."""
    model, rows = gpt2(), texts()
    before = trained(model)
    by_author = [[r for r in rows if r["author"] == f"author {a}"] for a in range(5)]
    expected = {name: torch.zeros_like(value) for name, value in before.items()}
    for author in by_author:
        model.zero_grad()
        model_loss(model, together(author)).backward()
        gradient = {n: p.grad for n, p in model.named_parameters()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        for name, value in gradient.items():
            expected[name] -= min(1, NORM / norm) * value / 5
    model.zero_grad()
    plan = plan_of(1, num_samples=5, expected_batch_size=5, unit="user")
    args = arguments(tmp_path, per_device_train_batch_size=2, max_steps=1)
    DPTrainer(model, args, train_dataset=rows, plan=plan, user_column="author").train()
    found = trained(model)
    assert_close({n: found[n] - before[n] for n in found}, expected)


def test_an_empty_batch_is_a_step(tmp_path: Path) -> None:
    plan = PrivacyPlan(
        num_samples=12,
        expected_batch_size=0.4,
        steps=12,
        delta=1e-3,
        noise_multiplier=1.0,
        accountant="rdp",
    )
    args = arguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=12
    )
    trainer = DPTrainer(gpt2(), args, train_dataset=texts(), plan=plan)
    trainer.train()
    assert trainer.ledger.steps == 12
    assert all(math.isfinite(log.get("loss_not_private", 0.0)) for log in trainer.state.log_history)


@pytest.mark.nightly
def test_losses_of_the_trainers_own_kinds(tmp_path: Path) -> None:
    """``compute_loss_func``, label smoothing and an overridden ``compute_loss`` receive one sample."""

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 0.5 * nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )

    class Own(DPTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, **rest: Any) -> Any:
            return own(model(**{**inputs, "labels": None}), inputs["labels"])

    kinds: Any = ((DPTrainer, {"compute_loss_func": own}), (Own, {}))
    for kind, options in kinds:
        model = gpt2()
        reference = copy.deepcopy(model)
        args = arguments(tmp_path, max_steps=1)
        kind(model, args, train_dataset=texts(), plan=plan_of(1), **options).train()

        def half(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return 0.5 * model_loss(model, batch)

        each = language.oracle.per_sample_gradients(reference, half, (together(texts()),))
        sums, _ = language.oracle.clipped_sum(each, NORM)
        expected = {n: value - sums[n] / 12 for n, value in trained(reference).items()}
        assert_close(trained(model), expected)
    args = arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1)
    DPTrainer(gpt2(), args, train_dataset=texts(), plan=plan_of(1)).train()


def test_bfloat16_trains(tmp_path: Path) -> None:
    model = gpt2(torch.float32)
    before = trained(model)
    trainer = DPTrainer(
        model, arguments(tmp_path, max_steps=1, bf16=True), train_dataset=texts(), plan=plan_of(1)
    )
    trainer.train()
    found = trained(model)
    sums = language.clipped(gpt2(), texts(), NORM)
    change = {n: (before[n] - found[n]).double() for n in found}
    error = math.sqrt(sum(float((change[n] - sums[n] / 12).square().sum()) for n in found))
    size = math.sqrt(sum(float((sums[n] / 12).square().sum()) for n in found))
    assert error < 0.05 * size
    assert all(value.dtype is torch.float32 for value in found.values())


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(texts())


def test_a_stream_trains_as_declared(tmp_path: Path) -> None:
    model = gpt2()
    expected = by_hand(copy.deepcopy(model), 1)
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"Stream without a length.*declared_sampling"):
        DPTrainer(gpt2(), args, train_dataset=Stream(), target_epsilon=1.0, delta=1e-3)
    plan = plan_of(1, declared_sampling="in the order of the stream")
    trainer = DPTrainer(model, args, train_dataset=Stream(), plan=plan)
    trainer.train()
    assert_close(trained(model), expected)
    (entry,) = trainer.ledger.history
    assert entry.declared == "in the order of the stream"


def test_a_foreign_gradient_is_refused(tmp_path: Path) -> None:
    class Writes(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)

    trainer = DPTrainer(
        gpt2(), arguments(tmp_path, max_steps=1), train_dataset=texts(), plan=plan_of(1), callbacks=[Writes()]
    )  # fmt: skip
    with pytest.raises(UnclippedGradientError, match="written by other code"):
        trainer.train()


def test_what_is_saved_holds_no_loss_under_its_own_name(tmp_path: Path) -> None:
    args = small(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    DPTrainer(gpt2(), args, train_dataset=texts(), plan=small_plan()).train()
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert {"loss_not_private", "epsilon", "noised_grad_norm"} <= state["log_history"][0].keys()
    assert "loss" not in state["log_history"][0]


def test_losses_that_are_not_finite_are_filtered_on_the_device(tmp_path: Path) -> None:
    finite, args = FiniteLosses(), arguments(tmp_path)
    given = [math.nan, 2.0, math.inf, -math.inf, 3.0, math.nan]
    found = [float(finite.of(torch.tensor(loss))) for loss in given]
    assert found == [0, 2, 2, 2, 3, 3]
    finite.of(torch.empty((), device="meta"))  # without a value, which nobody can read
    assert [finite.hide(args), finite.hide(args)] == [True, True]
    assert not args.logging_nan_inf_filter
    finite.restore(args)
    assert args.logging_nan_inf_filter


def test_a_batch_is_read_before_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collator may write each batch to the same memory, while the copy to a GPU waits in a queue."""
    memory = torch.tensor([1.0])
    queue: list[Callable[[], None]] = []

    def queued(batch: dict[str, Tensor], device: torch.device, non_blocking: bool) -> Any:
        assert non_blocking
        there = {name: torch.empty_like(value) for name, value in batch.items()}
        queue.append(lambda: [there[n].copy_(value) for n, value in batch.items()] and None)
        return there

    class Event:
        def record(self) -> None:
            self.after = len(queue)

        def synchronize(self) -> None:
            for move in queue[: self.after]:
                move()
            del queue[: self.after]

    monkeypatch.setattr(_transfer, "send_to_device", queued)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    transfer = _transfer.Transfer({"x": memory}, torch.device("cuda"))
    assert queue
    transfer.wait()
    memory.fill_(2.0)
    assert transfer.batch["x"].item() == 1.0


def test_each_step_waits_for_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Noting(_transfer.Transfer):
        def __init__(self, *given: Any) -> None:
            calls.append("copied")
            super().__init__(*given)

        def wait(self) -> None:
            calls.append("waited")

    monkeypatch.setattr("clipgrad.integrations.huggingface.Transfer", Noting)
    trainer = DPTrainer(
        gpt2(), small(tmp_path, max_steps=2), train_dataset=texts(), plan=small_plan(2)
    )
    trainer.train()
    assert calls == ["copied", "waited"] * 4  # two pieces in each of two steps


class Broken(DPTrainer):  # type: ignore[misc]  # transformers has no types
    """Losses of the third step and later are NaN. Notes the setting when the trainer looks at a loss."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.seen: list[bool] = []
        super().__init__(*args, **options)

    def create_optimizer(self, *args: Any) -> Any:
        made = super().create_optimizer(*args)
        backward = self.dp_optimizer.backward

        def broken(piece: Any) -> Any:
            return backward(piece) * 0 + (math.nan if self.state.global_step >= 2 else 3.0)

        self.dp_optimizer.backward = broken
        return made

    def training_step(self, *given: Any) -> Tensor:
        loss = super().training_step(*given)
        self.seen.append(self.args.logging_nan_inf_filter)
        return loss


class Settings(transformers.TrainerCallback):
    """Notes the setting wherever others can read it."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def _note(self, args: Any, *rest: Any, **options: Any) -> None:
        self.seen.append(args.logging_nan_inf_filter)

    on_step_begin = on_substep_end = on_step_end = on_log = on_save = on_evaluate = _note


@pytest.mark.parametrize("filters", [True, False])
def test_filter_of_losses_is_the_users(filters: bool, tmp_path: Path) -> None:
    """The user's setting holds for logs, and everybody else sees it as it is."""
    args = small(
        tmp_path, max_steps=4, per_device_train_batch_size=4, logging_nan_inf_filter=filters, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    data, watch = {"train_dataset": texts(), "eval_dataset": texts()}, Settings()
    # A batch of these is never empty.
    plan = small_plan(4, expected_batch_size=8)
    trainer = Broken(gpt2(), args, **data, plan=plan, callbacks=[watch])
    trainer.train()
    trainer.evaluate()
    assert set(trainer.seen) == {False}
    assert set(watch.seen) == {filters}
    assert args.logging_nan_inf_filter is filters
    saved = torch.load(tmp_path / "checkpoint-4/training_args.bin", weights_only=False)
    assert saved.logging_nan_inf_filter is filters
    losses = [x["loss_not_private"] for x in trainer.state.log_history if "learning_rate" in x]
    # In pieces of different sizes, the mean over a step is still that of the last finite loss.
    if filters:
        assert losses == pytest.approx([3.0] * 4)
    else:  # it stays in the trainer's running sum
        assert [math.isnan(loss) for loss in losses] == [False, False, True, True]


def test_a_training_inside_of_another_has_the_users_filter(tmp_path: Path) -> None:
    args = small(tmp_path, max_steps=3, per_device_train_batch_size=4)
    inner: list[Any] = []

    class Trains(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                plan = small_plan(3, expected_batch_size=8)
                inner.append(Broken(gpt2(), args, train_dataset=texts(), plan=plan))
                inner[0].train()

    plan = small_plan(3, expected_batch_size=8)
    outer = Broken(gpt2(), args, train_dataset=texts(), plan=plan, callbacks=[Trains()])
    outer.train()
    for trainer in (outer, inner[0]):
        logs = [x["loss_not_private"] for x in trainer.state.log_history if "learning_rate" in x]
        assert logs == pytest.approx([3.0] * 3)
    assert args.logging_nan_inf_filter


def test_an_empty_piece_is_not_read_either(tmp_path: Path) -> None:
    """A trainer's step has a fixed number of pieces, of which a small batch leaves some empty."""
    pieces = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = Broken(
        gpt2(), small(tmp_path, max_steps=8, **pieces), train_dataset=texts(), plan=small_plan(8)
    )
    trainer.train()
    assert trainer.seen == [False] * 32


def test_the_setting_is_put_back_after_an_error(tmp_path: Path) -> None:
    args = small(tmp_path, max_steps=3)
    trainer = Broken(
        gpt2(), args, train_dataset=texts(), plan=small_plan(3), callbacks=[stops_after(2)]
    )
    with pytest.raises(Stop):
        trainer.train()
    assert args.logging_nan_inf_filter


def test_the_norm_is_found_for_logged_steps_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    norm_of = torch.nn.utils.get_total_norm

    def noting(gradients: Any) -> Tensor:
        found.append(float(norm_of(gradients)))
        return norm_of(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", noting)
    args = small(tmp_path, max_steps=7, logging_steps=3, logging_first_step=True)
    trainer = DPTrainer(gpt2(), args, train_dataset=texts(), plan=small_plan())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert [log["step"] for log in logs] == [1, 3, 6]
    assert [log["noised_grad_norm"] for log in logs] == found


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({"fp16": True}, r"TrainingArguments\(fp16=True\) scales the loss.*bf16=True"),
    "torch_compile": ({"torch_compile": True}, r"torch_compile=True.*DPTrainer\(compile=True\)"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    "strategy": ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy=sequential"),
    "drop_last": ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
    "tokens": ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen=all.*private"),
    "data skip": ({"ignore_data_skip": True}, "ignore_data_skip=True.*fresh batches"),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps=2.*expected_batch_size=12. Set gradient_accumulation_steps=3",
    ),
    "max_steps": ({"max_steps": 9}, r"max_steps=9\) asks for 9 steps, but the plan has 4. Set max_steps=4"),
    "epochs": (
        {"max_steps": -1, "num_train_epochs": 5},
        r"num_train_epochs=5\) asks for 5 steps, but the plan has 4",
    ),
    "norm": ({"max_grad_norm": 0.7}, r"max_grad_norm=0.7\) differs from the plan's max_grad_norm=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_conflicting_arguments_are_refused_by_name(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    try:
        args = arguments(tmp_path, **{"max_steps": 4, **options})
    except (ValueError, TypeError, FutureWarning) as error:
        pytest.skip(f"transformers refuses it already: {error}")
    with pytest.raises(ValueError, match=message):
        DPTrainer(gpt2(), args, train_dataset=texts(), plan=plan_of())


def test_other_refusals(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4)
    with pytest.raises(
        ValueError, match=r"needs plan=.*or target_epsilon and delta, which are 3.0 and None"
    ):
        DPTrainer(gpt2(), args, train_dataset=texts(), target_epsilon=3.0)
    with pytest.raises(ValueError, match="plan already sets what target_epsilon and delta"):
        DPTrainer(gpt2(), args, train_dataset=texts(), plan=plan_of(), delta=1e-3)
    with pytest.raises(ValueError, match="needs train_dataset"):
        DPTrainer(gpt2(), args, plan=plan_of())
    with pytest.raises(ValueError, match="user_column='writer' is no column of train_dataset"):
        DPTrainer(gpt2(), args, train_dataset=texts(), plan=plan_of(), user_column="writer")
    unclipped = arguments(tmp_path, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="turns clipping off"):
        DPTrainer(gpt2(), unclipped, train_dataset=texts(), target_epsilon=3.0, delta=1e-3)
    with pytest.raises(ValueError, match="is 12, more than the 5 samples"):
        DPTrainer(gpt2(), args, train_dataset=texts(5), target_epsilon=3.0, delta=1e-3)
    trainer = DPTrainer(gpt2(), args, train_dataset=texts(), plan=plan_of())
    with pytest.raises(
        ValueError, match="hyperparameter_search trains on the private data many times"
    ):
        trainer.hyperparameter_search()
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        _ = trainer.dp_optimizer
    assert trainer.epsilon() == 0.0
    model = gpt2()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    private = DPOptimizer(inner, model, model_loss, plan=plan_of())
    trainer = DPTrainer(
        model, args, train_dataset=texts(), plan=plan_of(), optimizers=(private, None)
    )
    with pytest.raises(ValueError, match=r"optimizer must be an ordinary torch\.optim\.Optimizer"):
        trainer.train()


def test_a_batch_without_labels_says_so(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in texts()]
    trainer = DPTrainer(
        gpt2(), arguments(tmp_path, max_steps=1), train_dataset=rows, plan=plan_of(1)
    )
    with pytest.raises(
        ValueError, match=r"holds input_ids, but no labels, without which.*Add them"
    ):
        trainer.train()


def test_correlated_noise_is_refused_since_checkpoints_must_stay_secret(tmp_path: Path) -> None:
    plan = small_plan(accountant="pld", mechanism=clipgrad.BandedFactorisation(bands=2))
    with pytest.raises(ValueError, match=r"must stay secret.*files that others can read"):
        DPTrainer(gpt2(), small(tmp_path, max_steps=7), train_dataset=texts(), plan=plan).train()


@pytest.mark.parametrize("by_name", [False, True])
def test_choices_by_an_evaluation_on_the_training_data_are_refused(
    by_name: bool, tmp_path: Path
) -> None:
    rows, others = texts(), texts(seed=1)
    args = arguments(tmp_path, max_steps=4, lr_scheduler_type="reduce_lr_on_plateau",
                     eval_strategy="steps", eval_steps=1)  # fmt: skip

    def make(found: Any) -> None:
        evaluated = {"other": others, "one": found} if by_name else found
        DPTrainer(gpt2(), args, train_dataset=rows, eval_dataset=evaluated, plan=plan_of())

    with pytest.raises(ValueError, match=r"metric_for_best_model=loss\) chooses by an evaluation"):
        make(rows)
    make(others)


def test_a_dataset_is_recognised_by_its_content() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self._fingerprint = name

    assert _is_same(Named("a"), Named("a"))
    assert not _is_same(Named("a"), Named("b"))
    assert not _is_same([], [])
