"""This module has language models with a causal mask, trained on texts of unequal lengths."""

from __future__ import annotations

from typing import Any

import torch

from tests.families._family import VOCABULARY, add, hugging_face, language

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_GPT = {**_TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_NEW = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GROUPED = {**_NEW, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}


def _decoder(family: str, name: str, base: dict[str, Any], **other: Any) -> None:
    settings = {key: other.pop(key) for key in ("dtype", "tolerance", "note") if key in other}
    make = hugging_face(f"{name}ForCausalLM", f"{name}Config", **{**base, **other})
    add(family, make, language, **settings)


add("gpt2", hugging_face("GPT2LMHeadModel", "GPT2Config", **_GPT), language)
_decoder("gptj", "GPTJ", _GPT, rotary_dim=2)
_decoder(
    "gpt-neo", "GPTNeo", {**_TOKENS, "hidden_size": 16, "num_layers": 2, "num_heads": 4}, window_size=4,
    attention_types=[[["global", "local"], 1]], max_position_embeddings=32,
)  # fmt: skip
_decoder("gpt-neox", "GPTNeoX", _NEW)
_decoder("gpt-bigcode", "GPTBigCode", _GPT)
_decoder("codegen", "CodeGen", _GPT, rotary_dim=2)
_decoder("llama", "Llama", _GROUPED)
_decoder("llama-tied", "Llama", _GROUPED, tie_word_embeddings=True)
_decoder("mistral", "Mistral", _GROUPED, sliding_window=4)
_decoder("qwen2", "Qwen2", _GROUPED)
_decoder("qwen3", "Qwen3", _HEADS)
_decoder("gemma", "Gemma", _HEADS)
_decoder("gemma2", "Gemma2", _HEADS, sliding_window=8, query_pre_attn_scalar=4)
add(
    "gemma3",
    hugging_face("Gemma3ForCausalLM", "Gemma3TextConfig", **_HEADS, sliding_window=8, query_pre_attn_scalar=4),
    language,
)  # fmt: skip
_decoder("phi", "Phi", _NEW)
_decoder("phi3", "Phi3", _GROUPED)
_decoder("olmo2", "Olmo2", _GROUPED)
_decoder("granite", "Granite", _GROUPED)
_decoder("smollm3", "SmolLM3", _GROUPED)
_decoder("stablelm", "StableLm", _GROUPED)
_decoder("starcoder2", "Starcoder2", _GROUPED)
_decoder("cohere", "Cohere", _GROUPED)
_FALCON = {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_decoder("falcon", "Falcon", _FALCON)
_decoder("falcon-alibi", "Falcon", _FALCON, alibi=True)
_BLOOM = {**_TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4}
_decoder("bloom", "Bloom", _BLOOM)
_decoder("mpt", "Mpt", {**_TOKENS, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32})
_decoder("opt", "OPT", _NEW, ffn_dim=24, word_embed_proj_dim=16)
_decoder(
    "xglm", "XGLM", {**_TOKENS, "d_model": 16, "num_layers": 2, "attention_heads": 4, "ffn_dim": 24},
    max_position_embeddings=32, dtype=torch.float32, tolerance=1e-4, note="float32: its mask overflows in float64",
)  # fmt: skip
_decoder(
    "mixtral", "Mixtral", _GROUPED, **_EXPERTS, dtype=torch.float32, tolerance=1e-4,
    note="float32: grouped products of experts have no float64 kernel",
)  # fmt: skip
_decoder("mixtral-batched", "Mixtral", _GROUPED, **_EXPERTS, experts_implementation="batched_mm")
_decoder(
    "qwen2-moe", "Qwen2Moe", _GROUPED, **_EXPERTS, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    dtype=torch.float32, tolerance=1e-4,
)  # fmt: skip
_STATES = {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
_decoder("mamba", "Mamba", _STATES)
_decoder(
    "mamba2", "Mamba2", _STATES, head_dim=8, num_heads=4, n_groups=2, chunk_size=4,
    tolerance=1e-6, note="its scan casts to float32, which a compiled step rounds in another order",
)  # fmt: skip
