"""Unmodified Hugging Face models, tiny and randomly initialised; nothing is downloaded.

transformers is imported only when a model is made, so that listing the names needs no such package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures import Architecture

VOCABULARY, LENGTH = 23, 6
# transformers asks in python whether a mask hides anything at all (BERT always, decoders with fused
# attention); and a model that knows its padding token looks for it in the input.
BRANCHES_ON_DATA = r"control flow|data.dependent"
HF_MODELS: dict[str, Architecture] = {}


def _builder(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return built

    return make


def _add(
    name: str,
    make: Callable[[], nn.Module],
    batch: Callable[[int], tuple[Any, ...]],
    loss: Callable[..., Tensor],
    why: str,
    *,
    may_refuse: str | None = None,
) -> None:
    HF_MODELS[name] = Architecture(name, make, batch, loss, why=why, may_refuse=may_refuse)


def tokens(size: int) -> tuple[Tensor]:
    return (torch.randint(1, VOCABULARY, (size, LENGTH)),)


def padded(size: int) -> tuple[dict[str, Tensor]]:
    """Token ids, an attention mask that ends early for some samples, and labels ignored there."""
    ids = torch.randint(1, VOCABULARY, (size, LENGTH))
    lengths = torch.randint(3, LENGTH + 1, (size, 1))
    mask = (torch.arange(LENGTH) < lengths).long()
    return ({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)},)


def fully_masked(size: int) -> tuple[dict[str, Tensor]]:
    """The same with the mask spelled out, (batch, heads, queries, keys): nothing is left to ask."""
    (batch,) = padded(size)
    mask = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, LENGTH, -1)
    return ({**batch, "attention_mask": mask},)


def labelled(size: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1, VOCABULARY, (size, LENGTH)), torch.randint(3, (size,))


def images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 8, 8), torch.randint(3, (size,))


def pairs(size: int) -> tuple[Tensor, Tensor]:
    source, target = (torch.randint(1, VOCABULARY, (size, LENGTH)) for _ in range(2))
    return source, target[:, :4].contiguous()


def own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own language-model loss."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def own_loss_of_dict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def own_loss_of_pairs(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=source, labels=target).loss
    return loss


def own_loss_of_images(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(pixel_values=pixels, labels=labels).loss
    return loss


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    """The cross entropy that a user's own loop would write."""
    logits = model(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def classify_logits(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).logits, labels)


_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ENCODER = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_BERT = {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 8}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8,
    "n_layers": 1,
    "n_heads": 2,
    "dim": 8,
    "hidden_dim": 12,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "num_labels": 3,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 6,
}

_gpt2 = _builder("GPT2LMHeadModel", "GPT2Config", **_GPT2)
_eager_gpt2 = _builder("GPT2LMHeadModel", "GPT2Config", **_GPT2, attn_implementation="eager")
_gpt2_classifier = _builder(
    "GPT2ForSequenceClassification", "GPT2Config", **_GPT2, num_labels=3, pad_token_id=0
)
_bert_lm = _builder("BertForMaskedLM", "BertConfig", **_BERT)
_bert_classifier = _builder("BertForSequenceClassification", "BertConfig", **_BERT)
_distilbert = _builder("DistilBertForSequenceClassification", "DistilBertConfig", **_DISTILBERT)
_vit = _builder(
    "ViTForImageClassification", "ViTConfig", **_ENCODER, image_size=8, patch_size=4, num_channels=3
)
_llama = _builder("LlamaForCausalLM", "LlamaConfig", **_DECODER)
_eager_llama = _builder("LlamaForCausalLM", "LlamaConfig", **_DECODER, attn_implementation="eager")
_tied_llama = _builder("LlamaForCausalLM", "LlamaConfig", **_DECODER, tie_word_embeddings=True)
_qwen2 = _builder("Qwen2ForCausalLM", "Qwen2Config", **_DECODER)
_t5 = _builder("T5ForConditionalGeneration", "T5Config", **_T5)

_add("gpt2", _gpt2, tokens, own_loss, "tied embeddings, Conv1D layers, position ids")
_add("gpt2_own_loop", _gpt2, tokens, next_token, "the loss is computed outside the model")
_add("gpt2_eager", _eager_gpt2, tokens, own_loss, "attention without the fused operation")
_add("gpt2_eager_padded", _eager_gpt2, padded, own_loss_of_dict, "attention mask, ignored labels")
_add("bert_classifier", _bert_classifier, labelled, classify_logits, "pooled classification")
_add("bert_full_mask", _bert_lm, fully_masked, own_loss_of_dict, "tied table, own output bias")
_add("distilbert_classifier", _distilbert, labelled, classify_logits, "reads the first token only")
_add("vit_classifier", _vit, images, own_loss_of_images, "patches by convolution, class token")
_add("llama", _llama, tokens, own_loss, "rotary positions, RMS norm, grouped queries")
_add("llama_eager_padded", _eager_llama, padded, own_loss_of_dict, "with attention mask")
_add("llama_tied", _tied_llama, tokens, next_token, "tied embeddings without a bias")
_add("qwen2", _qwen2, tokens, own_loss, "biases in the attention projections only")
_add("t5", _t5, pairs, own_loss_of_pairs, "shared table, relative position biases of all layers")

for _name, _make in (("gpt2", _gpt2), ("bert", _bert_lm), ("llama", _llama)):
    _add(
        f"{_name}_padded",
        _make,
        padded,
        own_loss_of_dict,
        "attention mask with fused attention: a python branch on whether anything is hidden",
        may_refuse=BRANCHES_ON_DATA,
    )
_add(
    "gpt2_classifier",
    _gpt2_classifier,
    labelled,
    classify_logits,
    "looks for the padding token, and finds the last real token by its data",
    may_refuse=BRANCHES_ON_DATA,
)
