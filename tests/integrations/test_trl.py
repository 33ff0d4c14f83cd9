"""``DPSFTTrainer`` takes the steps of a slow loop, prepares texts as TRL does, and refuses what mixes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("transformers", "accelerate", "trl", "datasets", "tokenizers"):
    pytest.importorskip(package)
import datasets  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from clipgrad.integrations.trl import DPSFTTrainer  # noqa: E402
from tests.integrations import language  # noqa: E402
from tests.integrations.test_huggingface import assert_close, by_hand, plan_of, trained  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,  # TRL loads the graph that a mask asks for, in seconds each
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # of TRL
]
NORM = 0.5


def tokenizer() -> Any:
    words = {str(number): number for number in range(language.VOCABULARY)}
    model = tokenizers.models.WordLevel(words, unk_token="0")
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="0", eos_token="1"
    )


def tokens() -> Any:
    """The rows of the other tests, as a dataset of token sequences."""
    names = ("input_ids", "attention_mask", "labels")
    rows = language.texts(masks=True)
    return datasets.Dataset.from_list([{n: row[n].tolist() for n in names} for row in rows])


def trainer(
    model: Any, folder: Path, dataset: Any, kind: type[DPSFTTrainer] = DPSFTTrainer, **options: Any
) -> DPSFTTrainer:
    given = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "learning_rate": 1.0, "max_steps": 2,
        "lr_scheduler_type": "constant", "optim": "sgd", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 1, "save_strategy": "no", "bf16": False, "max_length": None,
    }  # fmt: skip
    own = {
        name: options.pop(name)
        for name in ("data_collator", "compute_loss_func")
        if name in options
    }
    return kind(
        model,
        trl.SFTConfig(str(folder), **{**given, **options}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer(),
        plan=plan_of(2, max_grad_norm=NORM),
        **own,
    )


def test_the_steps_are_those_of_a_slow_loop(tmp_path: Path) -> None:
    model = language.gpt2()
    expected = by_hand(copy.deepcopy(model), 2, norm=NORM, masks=True)
    ours = trainer(model, tmp_path, tokens(), data_collator=transformers.default_data_collator)
    ours.train()
    assert_close(trained(model), expected)
    assert ours.ledger.steps == 2
    logged = {name for line in ours.state.log_history for name in line}
    assert {"loss_not_private", "epsilon"} <= logged
    assert not logged & {"loss", "entropy", "mean_token_accuracy", "num_tokens"}
    assert "eval_mean_token_accuracy" in ours.evaluate()


def test_texts_are_prepared_and_a_run_is_resumed(tmp_path: Path) -> None:
    written = datasets.Dataset.from_dict({"text": [f"{n} {n + 1} 7 {n + 2}" for n in range(2, 14)]})
    model = language.gpt2(torch.float32)
    ours = trainer(model, tmp_path, written, save_strategy="steps", save_steps=1)
    ours.train()
    assert len(ours.train_dataset) == ours.plan.num_samples == 12
    again = trainer(language.gpt2(torch.float32), tmp_path, written)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.ledger.steps == again.state.global_step == 2


REFUSED: dict[str, Any] = {
    "packing": True, "padding_free": True, "loss_type": "dft", "label_smoothing_factor": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_or_measures_texts_is_refused_by_name(name: str, tmp_path: Path) -> None:
    options = {name: REFUSED[name], "max_length": 8 if name == "packing" else None}
    with pytest.raises(ValueError, match=rf"TrainingArguments\({name}="):
        trainer(language.gpt2(), tmp_path, tokens(), **options)


def test_another_loss_is_refused(tmp_path: Path) -> None:
    ours = trainer(language.gpt2(), tmp_path, tokens(), compute_loss_func=lambda *_, **__: 0)
    with pytest.raises(ValueError, match="another loss than the model's"):
        ours.train()

    class Other(DPSFTTrainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            raise AssertionError

    with pytest.raises(ValueError, match="another loss than the model's"):
        trainer(language.gpt2(), tmp_path, tokens(), kind=Other).train()
