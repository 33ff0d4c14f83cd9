"""Make the models of several benchmarks from ``transformers`` configurations, with random weights."""

from __future__ import annotations

from typing import Any

from torch import nn

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The layers of Llama that get adapters."""


def gpt2(*, tiny: bool = False) -> nn.Module:
    """Return GPT-2 small in float32 without dropout, or a small model of the same kind."""
    import transformers

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 512} if tiny else {}
    config = transformers.GPT2Config(
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False, **sizes
    )
    config.bos_token_id = config.eos_token_id = 1
    return transformers.GPT2LMHeadModel(config)


def llama(*, tiny: bool = False, big: bool = False) -> nn.Module:
    """Return Llama of one billion parameters, of eight billion, or a small model of the same kind."""
    import transformers

    one: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    eight: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    small: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config = transformers.LlamaConfig(use_cache=False, **(small if tiny else eight if big else one))
    return transformers.LlamaForCausalLM(config)


def vit(*, tiny: bool = False, masked: bool = True) -> nn.Module:
    """Return ViT-B/16 with a classifier of ten labels and no dropout, or a small model of the same kind.

    Images need no mask. With PyTorch 2.11 ``transformers`` makes one all the same while ``torch.compile`` looks on, and
    PyTorch has no fused attention for it. ``masked=False`` registers attention that gets no mask.
    """
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not masked:
        transformers.AttentionInterface.register("sdpa_unmasked", sdpa_attention_forward)
        transformers.AttentionMaskInterface.register("sdpa_unmasked", lambda **_: None)
    small: dict[str, Any] = {
        "image_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    config = transformers.ViTConfig(
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
        attn_implementation="sdpa" if masked else "sdpa_unmasked",
        **(small if tiny else {}),
    )
    return transformers.ViTForImageClassification(config)
