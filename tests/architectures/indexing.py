"""Position tables, and parameters that are indexed, sliced, split or held in lists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, floats, ids, normal, several

TOKENS = ids(6, 5)


class PositionTable(nn.Module):
    """A bare parameter is added to every sample."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.positions, self.head = normal(*shape), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.positions).tanh())


add("position_parameter_1td", lambda: PositionTable(1, 5, 4), floats(5, 4), "shape (1, T, D)")
add(
    "position_parameter_td",
    lambda: PositionTable(5, 4),
    floats(5, 4),
    "shape (T, D), no batch axis",
)
add("position_parameter_d", lambda: PositionTable(4), floats(5, 4), "shape (D,)")


@architecture("class_token", floats(5, 4))
class ClassToken(nn.Module):
    """A learned token is expanded over the batch and put in front; positions are cut to length."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions, self.mix = normal(1, 1, 4), normal(1, 9, 4), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions[:, : x.shape[1]]
        return self.mix(x.mT).tanh()[..., 0]


@architecture("mask_token", several(floats(5, 4), lambda size: (torch.rand(size, 5) > 0.5,)))
class MaskToken(nn.Module):
    """A learned token replaces the masked positions, by torch.where."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = normal(4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(torch.where(mask.unsqueeze(-1), self.token, x).tanh())


@architecture("rows_by_data", TOKENS)
class RowsByData(nn.Module):
    """Parameter rows are gathered in four ways: w[ids], index_select, gather and take_along_dim."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.columns = normal(6, 4), normal(5, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.table[tokens].tanh().sum(-1)
        selected = self.table.index_select(0, tokens.flatten()).square().sum(-1)
        columns = self.columns.expand(len(tokens), -1, -1)
        gathered = columns.gather(2, tokens.unsqueeze(-1)).squeeze(-1)
        along = torch.take_along_dim(self.columns, tokens.T, dim=1).T
        return rows + selected.view_as(tokens) * gathered + along


@architecture("one_hot_rows", TOKENS, may_refuse=r"one_hot|control flow|data.dependent")
class OneHotRows(nn.Module):
    """An embedding spelled as a one-hot product; F.one_hot looks at its data to check it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = normal(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hot = F.one_hot(tokens, 6).to(self.table.dtype)
        return (hot @ self.table).tanh() * F.embedding(tokens, self.table)


@architecture("weight_slices", floats(5, 4))
class WeightSlices(nn.Module):
    """Row, column and overlapping slices of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = normal(6, 8), normal(6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.weight[:4, :4], self.bias[:4]).tanh()
        hidden = F.linear(hidden, self.weight[2:, 2:6], self.bias[2:]).tanh()
        return F.linear(hidden, self.weight[::2, 1::2]) + self.weight[0, 0]


@architecture("packed_qkv_chunks", floats(5, 4))
class PackedProjection(nn.Module):
    """One packed weight, used whole, in chunks, by torch.split and by unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = normal(12, 4), normal(12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        parts = torch.split(self.weight, [4, 4, 4])
        biases = self.bias.view(3, 4).unbind(0)
        key = key + F.linear(x, parts[1].tanh(), biases[0])
        mixed = (query @ key.transpose(1, 2)).softmax(-1) @ value
        return F.linear(mixed, parts[2]) + biases[2]


@architecture("parameter_list", floats(4))
class ListOfParameters(nn.Module):
    """Parameters live in a ParameterList, layers in a ModuleList chosen by index."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([normal(4, 4) for _ in range(3)])
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for step, weight in enumerate(self.weights):
            x = self.layers[step % 2](F.linear(x, weight).tanh())
        return x


@architecture("parameter_dict", floats(5, 4))
class DictOfParameters(nn.Module):
    """Parameters live in a ParameterDict; all of them are stacked before use."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: normal(3, 4) for name in ("a", "b", "c")})

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([self.weights[name] for name in ("c", "a", "b")])
        return torch.einsum("bti,koi->btko", x, stacked).tanh()


@architecture("relative_position_bias", floats(4, 3))
class RelativePositionBias(nn.Module):
    """An attention bias table, indexed by a buffer of relative positions (Swin, T5)."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.project = normal(7, 2), nn.Linear(3, 6)
        steps = torch.arange(4)
        self.register_buffer("index", steps[:, None] - steps[None, :] + 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.project(x).unflatten(-1, (2, 3)).transpose(1, 2), x.unsqueeze(1)
        bias = self.table[self.index].permute(2, 0, 1).unsqueeze(0)
        return (query @ key.transpose(-1, -2) + bias).softmax(-1) @ x.unsqueeze(1)


@architecture("sinusoidal_buffer", floats(5, 4))
class SinusoidalBuffer(nn.Module):
    """A buffer that is only read."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("table", torch.sin(torch.arange(36.0).view(9, 4)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.table[: x.shape[1]]).tanh())


@architecture("assignment_into_zeros", floats(4, 4), may_refuse=r"in[- ]?place")
class AssignmentIntoZeros(nn.Module):
    """Parameters and features are written into a fresh torch.zeros, slice by slice."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = normal(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 5, 4, dtype=x.dtype, device=x.device)
        out[:, 0] = self.token
        out[:, 1:] = self.head(x).repeat(1, 1, 2)[..., :4]
        return self.head(out.tanh())


@architecture("assignment_into_new_zeros", floats(4, 4))
class AssignmentIntoNewZeros(nn.Module):
    """The same through x.new_zeros, which vmap can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = normal(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 5, 4)
        out[:, 0] = self.token
        out[:, 1:] = self.head(x).repeat(1, 1, 2)[..., :4]
        return self.head(out.tanh())
