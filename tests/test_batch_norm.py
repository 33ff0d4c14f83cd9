"""replace_batch_norm: what it takes over, how it groups, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import clipgrad
from clipgrad.batch_norm import replace_batch_norm


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (nn.BatchNorm2d(1), 1),
        (nn.BatchNorm2d(2), 1),
        (nn.BatchNorm2d(3), 1),
        (nn.BatchNorm2d(4), 2),
        (nn.BatchNorm2d(16), 8),
        (nn.BatchNorm2d(24), 12),
        (nn.BatchNorm2d(37), 1),
        (nn.BatchNorm3d(64), 32),
        (nn.BatchNorm2d(96), 32),
        (nn.BatchNorm2d(100), 25),
        (nn.SyncBatchNorm(512), 32),
        (nn.BatchNorm1d(4), 1),
        (nn.BatchNorm1d(64), 8),
        (nn.BatchNorm1d(512), 32),
    ],
    ids=str,
)
def test_default_groups(layer: nn.Module, groups: int) -> None:
    replacement = replace_batch_norm(layer)
    assert isinstance(replacement, nn.GroupNorm)
    assert replacement.num_groups == groups


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_takes_over_what_the_layer_has(make: type[nn.BatchNorm2d]) -> None:
    layer = make(6, eps=1e-2, dtype=torch.float64)
    weight, bias = layer.weight, layer.bias
    nn.init.normal_(weight)
    bias.requires_grad_(False)
    model = nn.Sequential(nn.ModuleDict({"norm": layer}))
    layer.eval()
    assert replace_batch_norm(model) is model
    replacement = model[0]["norm"]
    assert isinstance(replacement, nn.GroupNorm)
    assert replacement.weight is weight
    assert replacement.bias is bias
    assert replacement.eps == 1e-2
    assert not replacement.training
    assert model[0].training
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = F.group_norm(x, replacement.num_groups, weight, bias, eps=1e-2)
    torch.testing.assert_close(replacement(x), expected)
    assert not list(model.buffers())
    assert {"0.norm.weight", "0.norm.bias"} == set(model.state_dict())


def test_without_affine_parameters() -> None:
    replacement = replace_batch_norm(nn.BatchNorm2d(4, affine=False))
    assert not list(replacement.parameters())
    assert "affine=False" in repr(replacement)
    assert replacement(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_device_is_kept() -> None:
    model = replace_batch_norm(nn.Sequential(nn.BatchNorm2d(4, device="meta")))
    assert model[0].weight.device.type == "meta"  # type: ignore[union-attr]


def test_a_shared_layer_stays_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(4)
            self.second = self.first
            self.other = nn.BatchNorm2d(4)
            self.other.weight = self.first.weight  # a tie between two layers
            self.inner = nn.ModuleList([self.first, nn.Identity(), self.other])

    model = Twice()
    replace_batch_norm(model)
    assert isinstance(model.first, nn.GroupNorm)
    assert model.first is model.second is model.inner[0]
    assert model.other is model.inner[2]
    assert model.other is not model.first
    assert model.other.weight is model.first.weight


def test_num_groups_is_used_and_has_to_divide() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(6)))
    before = repr(model)
    with pytest.raises(ValueError, match=r"num_groups=4 does not divide the 6 channels.*'1\.0'"):
        replace_batch_norm(model, num_groups=4)
    assert repr(model) == before  # an error leaves the model as it was
    replace_batch_norm(model, num_groups=2)
    assert [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)] == [2, 2]


@pytest.mark.parametrize("num_groups", [0, -1, 2.0, True, "4"])
def test_num_groups_is_checked(num_groups: object) -> None:
    with pytest.raises(ValueError, match=f"num_groups must be a positive integer.*{num_groups!r}"):
        replace_batch_norm(nn.Identity(), num_groups=num_groups)  # type: ignore[arg-type]


def test_lazy_batch_norm_is_refused_until_it_knows_its_channels() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"LazyBatchNorm2d.*run one batch"):
        replace_batch_norm(model)
    model(torch.randn(2, 4, 3, 3))
    replace_batch_norm(model)
    assert isinstance(model[0], nn.GroupNorm)


class Rectified(nn.BatchNorm2d):
    """As image libraries fuse them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Named(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_batch_norm_that_does_more_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'act' is a Rectified.*own forward.*by hand"):
        replace_batch_norm(nn.ModuleDict({"act": Rectified(4)}))
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", Double())
    with pytest.raises(ValueError, match="is parametrized"):
        replace_batch_norm(nn.ModuleDict({"norm": layer}))
    assert isinstance(replace_batch_norm(Named(4)), nn.GroupNorm)


def test_other_layers_are_left_alone() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(4), nn.LayerNorm(3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
    )
    before = copy.deepcopy(model.state_dict()), list(model)
    replace_batch_norm(model)
    assert list(model) == before[1]
    assert model.state_dict().keys() == before[0].keys()


def test_the_replaced_model_has_per_sample_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).sin().mean()

    gradient = clipgrad.clipped_grad(loss, max_grad_norm=1.0)
    x = torch.randn(4, 3, 6, 6)
    with pytest.raises(clipgrad.errors.NotPerSampleError, match="BatchNorm"):
        gradient(params, x)
    replace_batch_norm(model)
    assert gradient(params, x).grads.keys() == params.keys()
