"""This module has models made of PyTorch's own layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.families._family import LENGTH, VOCABULARY, Batch, add, masked


class Recurrent(nn.Module):
    """This language model has one recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 12)
        self.layers = kind(12, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.table(ids))[0])


class Encoder(nn.Module):
    """This model has PyTorch's encoder layers with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, padded: Tensor) -> Tensor:
        hidden = self.layers(self.table(ids), src_key_padding_mask=padded)
        return self.head(hidden.masked_fill(padded[..., None], 0.0).sum(1))


class Translator(nn.Module):
    """This is ``nn.Transformer`` with causal and padding masks; without ``is_causal`` it reads the mask."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = True if told else None
        self.table = nn.Embedding(VOCABULARY, 16)
        self.both = nn.Transformer(16, 4, 1, 1, 24, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, source: Tensor, padded: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], dtype=self.head.weight.dtype
        )
        hidden = self.both(
            self.table(source), self.table(target), tgt_mask=causal, src_key_padding_mask=padded,
            memory_key_padding_mask=padded, tgt_is_causal=self.told,
        )  # fmt: skip
        return self.head(hidden)


class UNet(nn.Module):
    """This U-Net has one level, a skip connection and group normalisation."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.down = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.SiLU()
        )
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.first(image)
        if self.checkpointed:
            down = checkpoint(self.down, first, use_reentrant=False)
        else:
            down = self.down(first)
        return self.last(torch.cat([first, self.up(down)], 1))


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def classify(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"] == 0), batch["labels"])


def translate(model: nn.Module, batch: Batch) -> Tensor:
    target = batch["target"]
    logits = model(batch["input_ids"], batch["attention_mask"] == 0, target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


def denoise(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["noisy"]), batch["image"])


def noisy(size: int) -> Batch:
    image = torch.randn(size, 3, 8, 8)
    return {"image": image, "noisy": image + torch.randn_like(image)}


def labelled(size: int) -> Batch:
    return {**masked(size), "labels": torch.randint(3, (size,))}


def paired(size: int) -> Batch:
    return {**masked(size), "target": torch.randint(3, VOCABULARY, (size, LENGTH - 3))}


add("lstm-language-model", lambda: Recurrent(nn.LSTM), masked, loss=next_token)
add("gru-language-model", lambda: Recurrent(nn.GRU), masked, loss=next_token)
add("nn-transformer-encoder", Encoder, labelled, loss=classify)
add("nn-transformer-encoder-eval", Encoder, labelled, loss=classify, training=False)
add("nn-transformer", lambda: Translator(True), paired, loss=translate)
add("nn-transformer-as-it-comes", lambda: Translator(False), paired, loss=translate)
add("u-net", UNet, noisy, loss=denoise)
add("u-net-checkpointed", lambda: UNet(True), noisy, loss=denoise)
