"""``DPSFTTrainer``: TRL's ``SFTTrainer`` with differential privacy. It needs ``trl`` and the extra ``huggingface``."""

from __future__ import annotations

from typing import Any

from clipgrad.integrations._huggingface_arguments import CONFLICTS, Conflict
from clipgrad.integrations.huggingface import PrivateTraining, model_loss

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        "clipgrad.integrations.trl needs TRL: pip install 'clipgrad[huggingface]' trl."
    ) from error

_SEVERAL_TEXTS = (
    "puts several texts into one row, which would be protected as one sample. Leave it out."
)


class DPSFTTrainer(PrivateTraining, SFTTrainer):
    """TRL's ``SFTTrainer`` that trains with differential privacy; see ``PrivateTraining`` for its arguments.

    It prepares texts, chats and adapters (``peft_config``) as usual. The loss is the model's own: the mean over the
    tokens of one text that have labels. Entropy and accuracy of tokens are measured at evaluation only, since they are
    functions of private texts.
    """

    _conflicts = (
        *CONFLICTS,
        Conflict("packing", bool, _SEVERAL_TEXTS),
        Conflict("padding_free", bool, _SEVERAL_TEXTS),
        Conflict(
            "loss_type",
            lambda value: value != "nll",
            "is not the loss of the model. Leave it out, or use DPTrainer with compute_loss_func.",
        ),
        Conflict(
            "label_smoothing_factor",
            lambda value: value != 0,
            "makes SFTTrainer measure a whole batch. Leave it out, or use DPTrainer.",
        ),
        Conflict(
            "activation_offloading",
            bool,
            "moves tensors of all samples by hooks. Leave it out, and set per_device_train_batch_size to what fits.",
        ),
    )

    def _loss_of_batch(self) -> Any:
        """The model's own loss: that of ``SFTTrainer`` reads values of a whole batch.

        Raises:
            ValueError: If another loss is given.
        """
        if (
            self.compute_loss_func is not None
            or type(self).compute_loss is not SFTTrainer.compute_loss
        ):
            raise ValueError(
                "compute_loss or compute_loss_func gives another loss than the model's, and SFTTrainer measures a "
                "whole batch around it. Leave it out, or use DPTrainer, which calls compute_loss on one sample."
            )
        return model_loss
