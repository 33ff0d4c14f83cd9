"""This module has audio models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families._family import VOCABULARY, Batch, add, hugging_face

_CONVOLUTIONS = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 3),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0, "apply_spec_augment": False, "num_labels": 3, "classifier_proj_size": 8,
    "pad_token_id": 0,
}  # fmt: skip


def waves(size: int) -> Batch:
    return {"input_values": torch.randn(size, 200), "labels": torch.randint(3, (size,))}


def transcribed(size: int) -> Batch:
    labels = torch.randint(3, VOCABULARY, (size, 6))
    labels[1::2, 4:] = -100
    return {"input_values": torch.randn(size, 200), "labels": labels}


def frozen(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Freeze the feature encoder, as in fine-tuning; otherwise the model sets ``requires_grad`` of its input."""
    make = hugging_face(model, config, **{**_CONVOLUTIONS, **options})

    def frozen_feature_encoder() -> nn.Module:
        built = make()
        built.freeze_feature_encoder()  # type: ignore[operator]
        return built

    return frozen_feature_encoder


def ctc(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss without its check of the labels, which reads their values."""
    logits = model(input_values=batch["input_values"]).logits
    labels = batch["labels"]
    lengths = torch.full_like(labels[:, 0], logits.shape[1])
    scores = logits.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(scores, labels.clamp(min=0), lengths, (labels >= 0).sum(-1))


for _family, _name in (("wav2vec2", "Wav2Vec2"), ("hubert", "Hubert")):
    _ctc = frozen(f"{_name}ForCTC", f"{_name}Config")
    add(f"{_family}-ctc", _ctc, transcribed, loss=ctc)
    add(f"{_family}-ctc-as-it-comes", _ctc, transcribed)
_CLASSIFIER = "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config"
_STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
add("wav2vec2-classifier", frozen(*_CLASSIFIER), waves)
add("wav2vec2-layer-norm", frozen(*_CLASSIFIER, **_STABLE), waves)
add("wav2vec2-classifier-as-it-comes", hugging_face(*_CLASSIFIER, **_CONVOLUTIONS), waves)
add(
    "audio-spectrogram",
    hugging_face(
        "ASTForAudioClassification", "ASTConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=24, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8,
        num_labels=3,
    ),
    lambda size: {"input_values": torch.randn(size, 16, 8), "labels": torch.randint(3, (size,))},
)  # fmt: skip
