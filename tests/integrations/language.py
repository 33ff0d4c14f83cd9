"""Make small language models and data for the tests of training loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import oracle

VOCABULARY, LENGTH = 31, 6


def gpt2(dtype: torch.dtype = torch.float64) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=12, max_position_embeddings=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def lora(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    adapted: nn.Module = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide an error of A
            nn.init.normal_(parameter, std=0.1)
    return adapted.double()


def texts(count: int = 12, *, seed: int = 0, masks: bool = False) -> list[dict[str, Any]]:
    """Return token sequences of different lengths, padded on the right, with a column that no model takes.

    With masks a model asks for their values, so that its loss is captured as a graph, which takes seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        mask = torch.arange(LENGTH) < 3 + number % 4
        row = {"input_ids": ids * mask, "labels": ids.where(mask, -100)}
        if masks:
            row["attention_mask"] = mask.long()
        rows.append({**row, "author": f"author {number % 5}"})
    return rows


def together(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "author"}


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def clipped(
    model: nn.Module, rows: list[dict[str, Any]], max_grad_norm: float
) -> dict[str, Tensor]:
    """Return the clipped sum, computed by a slow loop over the rows."""
    each = oracle.per_sample_gradients(model, model_loss, (together(rows),))
    sums, norms = oracle.clipped_sum(each, max_grad_norm)
    assert (norms > max_grad_norm).any()
    return sums
