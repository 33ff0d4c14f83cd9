"""Models of sound."""

from __future__ import annotations

import torch

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


add("wav2vec2-ctc", hugging_face("Wav2Vec2ForCTC", "Wav2Vec2Config", **_CONVOLUTIONS), transcribed)
add("hubert-ctc", hugging_face("HubertForCTC", "HubertConfig", **_CONVOLUTIONS), transcribed)
add(
    "wav2vec2-classifier",
    hugging_face("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **_CONVOLUTIONS),
    waves,
)
add(
    "wav2vec2-layer-norm",
    hugging_face(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
        **{**_CONVOLUTIONS, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
    waves,
)  # fmt: skip
add(
    "audio-spectrogram",
    hugging_face(
        "ASTForAudioClassification", "ASTConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=24, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8,
        num_labels=3,
    ),
    lambda size: {"input_values": torch.randn(size, 16, 8), "labels": torch.randint(3, (size,))},
)  # fmt: skip
