"""This module has image models; batch normalisation is in evaluation mode, because it mixes samples in training."""

from __future__ import annotations

from typing import Any

import torch

from tests.families._family import Batch, add, hugging_face, images

_VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip


def _classifier(family: str, name: str, pixels: int, training: bool = True, **options: Any) -> None:
    make = hugging_face(
        f"{name}ForImageClassification", f"{name}Config", **{"num_labels": 3, **options}
    )
    add(family, make, images(pixels), training=training)


def segmented(size: int) -> Batch:
    return {
        "pixel_values": torch.randn(size, 3, 32, 32),
        "labels": torch.randint(3, (size, 32, 32)),
    }


_classifier("vit", "ViT", 16, **_VIT)
_classifier("deit", "DeiT", 16, **_VIT)
_classifier("beit", "Beit", 16, **_VIT, use_relative_position_bias=True)
_classifier("dinov2", "Dinov2", 16, **_VIT)
_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_classifier("swin", "Swin", 32, **_SWIN)
_classifier("swinv2", "Swinv2", 32, **_SWIN)
_classifier("convnext", "ConvNext", 32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
_classifier("convnextv2", "ConvNextV2", 32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
_STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_classifier(
    "resnet-eval", "ResNet", 32, False, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
)  # fmt: skip
_classifier("poolformer", "PoolFormer", 32, **_STAGES)
_classifier("pvt", "Pvt", 32, image_size=32, num_attention_heads=[1, 2, 4, 4], **_STAGES)
_SEGFORMER = {
    **_STAGES, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16, "num_labels": 3,
}  # fmt: skip
_classifier("segformer", "Segformer", 32, **_SEGFORMER)
add(
    "segformer-segmentation-eval",
    hugging_face("SegformerForSemanticSegmentation", "SegformerConfig", **_SEGFORMER),
    segmented,
    training=False,
)
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
add(
    "clip-images",
    hugging_face(
        "CLIPForImageClassification", "CLIPConfig", vision_config=_VIT, text_config=_TEXT, num_labels=3
    ),
    images(16),
)  # fmt: skip
