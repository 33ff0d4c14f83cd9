"""Models of Hugging Face with random weights: GPT-2 with a tied head, a vision transformer, Llama with adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.workloads._workload import Workload
from benchmarks.workloads.cnn import classification, images
from benchmarks.workloads.transformer import next_token, tokens

CLASSES = 10


class Logits(nn.Module):
    """A model of Hugging Face that returns its logits alone, as a criterion wants them."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x, **self.options).logits
        return logits


def gpt2(vocabulary: int, width: int, heads: int, layers: int, length: int) -> nn.Module:
    """GPT-2 without dropout; its head is the embedding."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_head=heads, n_layer=layers, n_positions=length,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return Logits(transformers.GPT2LMHeadModel(config), use_cache=False)


def vit(size: int, patch: int, width: int, heads: int, layers: int) -> nn.Module:
    """A vision transformer without dropout."""
    import transformers

    config = transformers.ViTConfig(
        image_size=size, patch_size=patch, hidden_size=width, num_attention_heads=heads,
        num_hidden_layers=layers, intermediate_size=4 * width, num_labels=CLASSES,
    )  # fmt: skip
    return Logits(transformers.ViTForImageClassification(config))


def llama_lora(vocabulary: int, width: int, heads: int, layers: int, rank: int) -> nn.Module:
    """Llama, of which only adapters on the attention's projections are trained."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, attn_implementation="sdpa",
    )  # fmt: skip
    # Adapters that start at zero would leave half of their gradients zero, and a check of them empty.
    lora = peft.LoraConfig(
        r=rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    return Logits(model, use_cache=False)


_VOCABULARY, _LENGTH = 1000, 64
HUGGING_FACE = (
    Workload(
        name="gpt2",
        description="GPT-2 of Hugging Face, tied head, vocabulary 1000, width 256, 4 heads, 2 layers, 64 tokens",
        model=partial(gpt2, _VOCABULARY, 256, 4, 2, _LENGTH),
        batch=partial(tokens, _VOCABULARY, _LENGTH),
        loss=next_token,
        batch_sizes={"cpu": (16,), "cuda": (32,)},
    ),
    Workload(
        name="vit",
        description="vision transformer of Hugging Face, 32x32x3 images, patches of 4, width 128, 4 heads, 4 layers",
        model=partial(vit, 32, 4, 128, 4, 4),
        batch=partial(images, 32),
        loss=classification,
        batch_sizes={"cpu": (16,), "cuda": (32,)},
    ),
    Workload(
        name="llama-lora",
        description="Llama of Hugging Face, LoRA of rank 8 on its attention, width 256, 4 heads, 4 layers, 64 tokens",
        model=partial(llama_lora, _VOCABULARY, 256, 4, 4, 8),
        batch=partial(tokens, _VOCABULARY, _LENGTH),
        loss=next_token,
        batch_sizes={"cpu": (16,), "cuda": (32,)},
    ),
)
