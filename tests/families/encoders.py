"""This module has encoders with padding masks that classify texts or predict masked tokens."""

from __future__ import annotations

from typing import Any

from tests.families._family import VOCABULARY, add, hugging_face, labelled, language

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_labels": 3,
    "pad_token_id": 1,
}


def _classifier(family: str, name: str, **other: Any) -> None:
    options = {**_BASE, **other}
    add(
        family,
        hugging_face(f"{name}ForSequenceClassification", f"{name}Config", **options),
        labelled,
    )


_classifier("bert", "Bert")
add("bert-mlm", hugging_face("BertForMaskedLM", "BertConfig", **_BASE), language)
_classifier("roberta", "Roberta")
_classifier("distilbert", "DistilBert", dim=16, n_layers=2, n_heads=4, hidden_dim=24)
_classifier("albert", "Albert", embedding_size=8)
_classifier("electra", "Electra", embedding_size=8)
_classifier("mpnet", "MPNet")
# Without it, DeBERTa looks for labels that are not negative, and their number depends on the data.
_SINGLE = {"problem_type": "single_label_classification"}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_V2 = {**_RELATIVE, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
_classifier("deberta", "Deberta", **_RELATIVE, **_SINGLE)
_classifier("deberta-v2", "DebertaV2", **_V2, **_SINGLE)
_classifier("deberta-v2-as-it-comes", "DebertaV2", **_V2)
_classifier(
    "modernbert", "ModernBert", local_attention=4, cls_token_id=0, sep_token_id=2, bos_token_id=0,
    eos_token_id=2, reference_compile=False,
)  # fmt: skip
add(
    "xlnet",
    hugging_face(
        "XLNetForSequenceClassification", "XLNetConfig", vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=4,
        d_inner=24, num_labels=3,
    ),
    labelled,
)  # fmt: skip
_classifier("squeezebert", "SqueezeBert", embedding_size=16)
_classifier("convbert", "ConvBert", embedding_size=16, conv_kernel_size=3)
add(
    "funnel",
    hugging_face(
        "FunnelForSequenceClassification", "FunnelConfig", vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=16,
        n_head=4, d_head=4, d_inner=24, num_labels=3,
    ),
    labelled,
)  # fmt: skip
add(
    "gpt2-classifier",
    hugging_face(
        "GPT2ForSequenceClassification", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4,
        n_positions=32, num_labels=3, pad_token_id=1,
    ),
    labelled,
)  # fmt: skip
