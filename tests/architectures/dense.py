"""Linear layers in every position, and batches of every structure."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, architecture, classify, floats, ids, normal, several


def _mlp(inputs: int, outputs: int, hidden: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


add("mlp", lambda: _mlp(4, 3), several(floats(4), ids(3)), "the plainest model", loss=classify)
add("linear_3d", lambda: _mlp(4, 3), floats(5, 4), "linear shared over one axis")
add("linear_4d", lambda: _mlp(4, 3), floats(2, 5, 4), "linear shared over two axes")
add("linear_no_bias", lambda: nn.Linear(4, 3, bias=False), floats(5, 4), "no bias at all")
add("linear_one_feature", lambda: _mlp(1, 1, hidden=1), floats(3, 1), "axes of size one")
add(
    "linear_bias_only_trained",
    lambda: _mlp(4, 3),
    floats(5, 4),
    "only biases are trained (BitFit)",
    trainable=lambda model: [p.requires_grad_(p.ndim == 1) for p in model.parameters()],
)


@architecture("linear_merged_axes", floats(5, 4))
class MergedAxes(nn.Module):
    """Batch and time are merged into one axis before the linear layer, and split afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        size, steps, _ = x.shape
        return self.inner(x.reshape(size * steps, -1)).view(size, steps, 3)


@architecture("linear_rows_one_by_one", floats(4))
class RowsOneByOne(nn.Module):
    """A python loop over the batch axis: the linear layer sees one-dimensional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(row) for row in x])


@architecture("linear_strided_input", floats(4, 5))
class StridedInput(nn.Module):
    """The layer's input is transposed, the next one's expanded: neither is contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.transpose(1, 2)).tanh()
        return self.second(hidden.mean(1, keepdim=True).expand(-1, 6, -1))


@architecture("linear_batch_axis_second", floats(5, 4))
class BatchAxisSecond(nn.Module):
    """The batch axis travels in second place (time first) through the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class ScaledLinear(nn.Linear):
    """A subclass of nn.Linear whose forward is not that of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias).relu() + super().forward(x)


add(
    "linear_subclass",
    lambda: ScaledLinear(4, 3),
    floats(5, 4),
    "a rule by module type would be wrong: the subclass computes something else",
)


@architecture("linear_keyword_operands", floats(2, 6, 6))
class KeywordOperands(nn.Module):
    """Every operand is passed by keyword, in an unusual order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.scale = normal(3, 2, 3, 3), normal(3)
        self.weight, self.shift = normal(4, 3), normal(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(weight=self.kernel, padding=1, stride=2, input=x).permute(0, 2, 3, 1)
        x = F.layer_norm(x, weight=self.scale, normalized_shape=(3,))
        return F.linear(bias=self.shift, weight=self.weight, input=x)


@architecture("linear_vector_weight", floats(5, 4))
class VectorWeight(nn.Module):
    """F.linear with a one-dimensional weight drops the feature axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).tanh()


@architecture("linear_parameter_as_input", floats(5, 4))
class ParameterAsInput(nn.Module):
    """A parameter is the input and data the weight; then both are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.mix = normal(3, 4), normal(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        by_data = torch.stack([F.linear(self.queries, sample) for sample in x])
        return torch.cat([by_data, F.linear(self.queries, self.mix).expand(len(x), -1, -1)], dim=2)


@architecture("linear_child_weight", floats(5, 4))
class ChildWeight(nn.Module):
    """The child's weight is used without calling the child, besides an ordinary call."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(F.linear(x, self.child.weight).tanh())


@architecture("scalar_parameters", floats(4))
class ScalarParameters(nn.Module):
    """Zero-dimensional parameters: a temperature, a gate and a learnable offset."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp(4, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.gate, self.offset = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate.sigmoid() * self.inner(x) / self.temperature.exp() + self.offset


@architecture("several_inputs", several(floats(4), floats(6, 3), ids(5)))
class SeveralInputs(nn.Module):
    """Three inputs of different rank and dtype meet late."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(3, 3)
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(9, 2)

    def forward(self, left: Tensor, right: Tensor, index: Tensor) -> Tensor:
        parts = [self.left(left), self.right(right).amax(1), self.table(index)]
        return self.head(torch.cat(parts, dim=-1).tanh())


@architecture(
    "dict_batch",
    lambda size: (
        {"x": torch.randn(size, 4), "mask": torch.rand(size, 4) > 0.3, "meta": [torch.randn(size)]},
    ),
)
class DictBatch(nn.Module):
    """The batch is a dictionary with a boolean mask and a list inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp(4, 3)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        masked = batch["x"].masked_fill(~batch["mask"], 0.0)
        return self.inner(masked) * batch["meta"][0].unsqueeze(-1)


@architecture(
    "nested_tuple_batch",
    lambda size: ((torch.randn(size, 4), (torch.randn(size, 2, 4), torch.randint(3, (size,)))),),
)
class NestedTupleBatch(nn.Module):
    """Tuples within a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(4, 3), nn.Embedding(3, 3)

    def forward(self, batch: tuple[Tensor, tuple[Tensor, Tensor]]) -> Tensor:
        first, (second, index) = batch
        return self.inner(first).tanh() * self.inner(second).sum(1) + self.table(index)


@architecture("scalar_per_sample", several(floats(), floats(4)))
class ScalarPerSample(nn.Module):
    """One input is a single number per sample: its batch has one axis only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp(5, 3)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        return self.inner(torch.cat([time[:, None], x], dim=1))


@architecture("film", several(floats(4), floats(6, 3)))
class FeatureModulation(nn.Module):
    """One input's network scales and shifts the other's features."""

    def __init__(self) -> None:
        super().__init__()
        self.condition, self.features = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        scale, shift = self.condition(context).unsqueeze(1).chunk(2, dim=-1)
        return self.features(x).tanh() * (1 + scale) + shift


@architecture("squeeze_of_batch_axis", floats(1, 4))
class SqueezedAxis(nn.Module):
    """squeeze(1) and unsqueeze next to a batch axis that has size one under clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.squeeze(1)).squeeze(-1).unsqueeze(1)


@architecture("batch_centred", floats(5, 4))
class BatchCentred(nn.Module):
    """Mixes samples through a mean over the batch; with a batch of one that mean is the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return self.outer(hidden.tanh() + hidden.mean(0, keepdim=True))
