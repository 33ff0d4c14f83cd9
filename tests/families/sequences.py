"""This module has encoder-decoder models."""

from __future__ import annotations

from typing import Any

import torch

from tests.families._family import VOCABULARY, Batch, add, hugging_face, masked


def pairs(size: int) -> Batch:
    labels = torch.randint(3, VOCABULARY, (size, 6))
    labels[1::2, 4:] = -100
    return {**masked(size), "labels": labels}


def spoken(size: int) -> Batch:
    return {
        "input_features": torch.randn(size, 8, 24),
        "labels": torch.randint(3, VOCABULARY, (size, 6)),
    }


_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
_BART = {
    **_TOKENS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
_T5 = {
    **_TOKENS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8,
}  # fmt: skip

add("t5", hugging_face("T5ForConditionalGeneration", "T5Config", **_T5), pairs)
add("mt5", hugging_face("MT5ForConditionalGeneration", "MT5Config", **_T5), pairs)
add("bart", hugging_face("BartForConditionalGeneration", "BartConfig", **_BART), pairs)
add("mbart", hugging_face("MBartForConditionalGeneration", "MBartConfig", **_BART), pairs)
add("pegasus", hugging_face("PegasusForConditionalGeneration", "PegasusConfig", **_BART), pairs)
add("marian", hugging_face("MarianMTModel", "MarianConfig", **_BART), pairs)
add(
    "whisper",
    hugging_face(
        "WhisperForConditionalGeneration", "WhisperConfig", **_BART, num_mel_bins=8, max_source_positions=12,
        max_target_positions=16,
    ),
    spoken,
)  # fmt: skip
