"""Weights used twice, tied, frozen, adapted, detached and unused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, classify_tokens, floats, freeze, ids, normal, several


@architecture("reused_linear", floats(4))
class ReusedLinear(nn.Module):
    """One linear layer twice in a row: the two uses' cross term belongs to the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@architecture("reused_linear_two_lengths", several(floats(3, 4), floats(4)))
class ReusedTwoLengths(nn.Module):
    """One linear layer on inputs of different rank and length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sequence: Tensor, single: Tensor) -> Tensor:
        return torch.cat([self.layer(sequence), self.layer(single)[:, None]], dim=1).tanh()


@architecture("siamese", several(floats(4), floats(4)))
class Siamese(nn.Module):
    """Both inputs pass the same encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.encoder(left) - self.encoder(right)).abs()


@architecture("time_loop", floats(6, 3))
class TimeLoop(nn.Module):
    """A recurrence in plain python: input and state weights are used at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.state = nn.Linear(3, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            hidden = torch.tanh(self.read(step) + self.state(hidden))
        return hidden


@architecture("same_module_two_names", floats(4))
class TwoNames(nn.Module):
    """One module registered under two names; its parameters are listed once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.third = nn.Linear(4, 4)
        self.third.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


@architecture("tied_embedding", several(ids(6, 5), ids(6, 5)), loss=classify_tokens)
class TiedEmbedding(nn.Module):
    """The embedding table is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.table(tokens)).tanh())


@architecture("tied_embedding_functional", several(ids(6, 5), ids(6, 5)), loss=classify_tokens)
class TiedFunctional(nn.Module):
    """Tied again, but the output layer is a product with the table's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.table(tokens) * 2.0).tanh() @ self.table.weight.t()


@architecture("linear_and_sum_of_weight", floats(5, 4))
class LinearAndSum(nn.Module):
    """The weight of a linear layer is used elsewhere too: one use has a rule, the other has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() * self.layer.weight.sum() + self.layer.bias.prod()


@architecture("lora", floats(5, 4), trainable=freeze("base"))
class LowRankAdapter(nn.Module):
    """A frozen base with a trained low-rank path."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 4), normal(2, 4), normal(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).tanh() + F.linear(F.linear(x, self.down), self.up) * 0.5


@architecture("lora_merged", floats(5, 4), trainable=freeze("base"))
class MergedAdapter(nn.Module):
    """The adapter is merged into the frozen weight on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 4), normal(2, 4), normal(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + 0.5 * self.up @ self.down, self.base.bias).tanh()


def _tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))


add("frozen_first", _tower, floats(4), "the first layers are frozen", trainable=freeze("0", "2"))
add("frozen_middle", _tower, floats(4), "a frozen layer must pass gradients", trainable=freeze("2"))
add("frozen_last", _tower, floats(4), "only the last layer is frozen", trainable=freeze("4"))
add(
    "frozen_weight_trained_bias",
    _tower,
    floats(4),
    "weights of two layers are frozen",
    trainable=freeze("0.weight", "4.weight"),
)


@architecture("unused_parameters", floats(4))
class UnusedParameters(nn.Module):
    """Never used, used only detached, or used and multiplied away: the gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(7, 7)
        self.detached, self.cancelled = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.used(x).tanh()
        with torch.no_grad():
            target = self.detached(hidden)
        return hidden + target + 0.0 * self.cancelled(hidden)


@architecture("detached_use", floats(4))
class DetachedUse(nn.Module):
    """One use of the weight is detached, the other is not; the first layer's output is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.weight = nn.Linear(4, 4), normal(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x).tanh()
        frozen = F.linear(hidden, self.weight.detach())
        return frozen + F.linear(hidden.detach(), self.weight).tanh()
