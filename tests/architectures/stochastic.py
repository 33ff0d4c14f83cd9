"""Models that draw random numbers in forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._base import add, architecture, classify, floats, ids, several


class Dropped(nn.Module):
    """Dropout of the given kind after a layer."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.layer, self.dropout, self.head = nn.Linear(4, 6), dropout, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.layer(x)))


add(
    "dropout",
    lambda: Dropped(nn.Dropout(0.4)),
    several(floats(4), ids(3)),
    "dropout",
    random=True,
    loss=classify,
)
add("dropout_eval", lambda: Dropped(nn.Dropout(0.4)).eval(), floats(4), "dropout in eval mode")
add(
    "dropout_inplace",
    lambda: Dropped(nn.Dropout(0.4, inplace=True)),
    floats(4),
    "in place",
    random=True,
)
add("dropout_alpha", lambda: Dropped(nn.AlphaDropout(0.4)), floats(4), "alpha dropout", random=True)
add(
    "dropout_attention",
    lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True),
    floats(5, 4),
    "dropout inside attention",
    random=True,
)
add("dropout_randomised_relu", lambda: Dropped(nn.RReLU()), floats(4), "random slopes", random=True)


@architecture("variational_autoencoder", floats(4), random=True)
class VariationalAutoencoder(nn.Module):
    """The forward draws its own noise with randn_like."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 6), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_scale = self.encode(x).chunk(2, dim=-1)
        return self.decode(mean + log_scale.exp() * torch.randn_like(mean))
