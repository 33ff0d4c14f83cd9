"""This module has PEFT adapters on frozen models, which are skipped if PEFT is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.families._family import VOCABULARY, add, hugging_face, language

_GPT2 = hugging_face(
    "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32
)  # fmt: skip
_LLAMA = hugging_face(
    "LlamaForCausalLM", "LlamaConfig", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32,
)  # fmt: skip


def _adapted(
    base: Callable[[], nn.Module], config: str, dtype: torch.dtype | None = None, **options: Any
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        peft = pytest.importorskip("peft")
        model = base() if dtype is None else base().to(dtype)
        adapted: nn.Module = peft.get_peft_model(model, getattr(peft, config)(**options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide an error of A
                nn.init.normal_(parameter, std=0.1)
        return adapted

    return make


_GPT2_LAYERS = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
_LLAMA_LAYERS = {"target_modules": ["q_proj", "v_proj"]}
_LM = {"task_type": "CAUSAL_LM"}
add("lora-gpt2", _adapted(_GPT2, "LoraConfig", r=2, **_GPT2_LAYERS, **_LM), language)
add("lora-llama", _adapted(_LLAMA, "LoraConfig", r=2, **_LLAMA_LAYERS, **_LM), language)
add(
    "dora-llama",
    _adapted(_LLAMA, "LoraConfig", r=2, use_dora=True, **_LLAMA_LAYERS, **_LM),
    language,
)
add(
    "lora-modules-to-save",
    _adapted(_LLAMA, "LoraConfig", r=2, modules_to_save=["lm_head"], **_LLAMA_LAYERS, **_LM),
    language,
)
add(
    "ia3-llama",
    _adapted(
        _LLAMA, "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **_LM
    ),
    language,
)  # fmt: skip
add(
    "prompt-tuning-llama",
    _adapted(_LLAMA, "PromptTuningConfig", num_virtual_tokens=3, **_LM),
    language,
)
add(
    "prefix-tuning-llama",
    _adapted(_LLAMA, "PrefixTuningConfig", num_virtual_tokens=3, **_LM),
    language,
)
add(
    "lora-llama-bf16-base",
    _adapted(_LLAMA, "LoraConfig", torch.bfloat16, r=2, **_LLAMA_LAYERS, **_LM),
    language,
    dtype=None,
    tolerance=0.05,
    note="base in bfloat16, adapters in float32",
)
