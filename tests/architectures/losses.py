"""Losses: reductions, ignored tokens, regularisers, several terms, derivatives within the loss."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import add, classify_tokens, floats, ids, several


def _mlp(inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def _language_model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6))


LABELLED = several(floats(4), ids(3))


def _partly_ignored(size: int) -> tuple[Tensor, Tensor]:
    tokens, labels = torch.randint(6, (size, 5)), torch.randint(6, (size, 5))
    # At least one label stays, or the mean over no tokens would be nan.
    labels[:, 1:][torch.rand(size, 4) > 0.5] = -100
    return tokens, labels


def _sum_of_tokens(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")


def _next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], label_smoothing=0.1)


def _masked_mean(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none")
    mask = (labels != -100).to(losses.dtype)
    return (losses * mask).sum() / mask.sum()


add(
    "loss_ignore_index",
    _language_model,
    _partly_ignored,
    "mean over tokens that are not ignored",
    loss=classify_tokens,
)
add("loss_sum_reduction", _language_model, _partly_ignored, "sum over tokens", loss=_sum_of_tokens)
add(
    "loss_masked_mean",
    _language_model,
    _partly_ignored,
    "mean by hand over a mask",
    loss=_masked_mean,
)
add(
    "loss_next_token",
    _language_model,
    ids(6, 6),
    "shifted labels, label smoothing",
    loss=_next_token,
)


def _regularised(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    return F.cross_entropy(model(x), labels) + 0.01 * penalty


def _penalised_weight(model: nn.Sequential, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels) + 0.1 * model[0].weight.norm(p=1)


def _only_penalty(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[0].weight.square().sum() + model[2].bias.exp().sum() + 0.0 * x.sum()


add(
    "loss_regularised",
    _mlp,
    LABELLED,
    "the sum of squared parameters is part of each sample's loss",
    loss=_regularised,
)
add(
    "loss_weight_penalty",
    _mlp,
    LABELLED,
    "one weight is read off the model in the loss",
    loss=_penalised_weight,
)
add(
    "loss_without_data",
    _mlp,
    floats(4),
    "the gradient is the same for every sample",
    loss=_only_penalty,
)


def _two_terms(model: nn.Sequential, x: Tensor, labels: Tensor) -> Tensor:
    hidden = model[0](x)
    reconstruction = F.mse_loss(F.linear(hidden, model[0].weight.t()), x)
    return F.cross_entropy(model[2](model[1](hidden)), labels) + 0.3 * reconstruction


def _two_passes(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    noisy = x + 0.1 * torch.sin(7.0 * x)
    return F.cross_entropy(model(x), labels) + F.mse_loss(model(noisy), model(x).detach())


def _contrastive(model: nn.Module, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return F.triplet_margin_loss(model(anchor), model(positive), model(negative), margin=3.0)


add("loss_two_terms", _mlp, LABELLED, "children are called one by one in the loss", loss=_two_terms)
add("loss_two_passes", _mlp, LABELLED, "three passes through the same model", loss=_two_passes)
add(
    "loss_triplet",
    _mlp,
    several(floats(4), floats(4), floats(4)),
    "three passes, one margin loss",
    loss=_contrastive,
)


class Distillation:
    """The teacher lives outside the model: its parameters are constants of the loss."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.teacher = _mlp()

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        weights = {name: p.to(x) for name, p in self.teacher.named_parameters()}
        with torch.no_grad():
            target = torch.func.functional_call(self.teacher, weights, (x,)).softmax(-1)
        return F.cross_entropy(model(x), target)


add(
    "loss_distillation",
    _mlp,
    floats(4),
    "a teacher outside the model is a constant",
    loss=Distillation(),
)


class Router(nn.Module):
    """A mixture whose load-balancing term is left on the module for the loss to find."""

    balance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        self.balance = weights.square().sum(-1).mean()
        return (self.experts(x).unflatten(-1, (3, 3)) * weights.unsqueeze(-1)).sum(-2)


def _with_balance(model: Router, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels) + model.balance


add(
    "loss_read_off_module",
    Router,
    LABELLED,
    "a loss term passes through a module attribute",
    loss=_with_balance,
)


def _gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    slope = torch.func.grad(lambda point: model(point).square().sum())(x)
    return model(x).mean() + (slope.square().sum(-1) + 1e-6).sqrt().mean()


def _autograd_penalty(model: nn.Module, x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(point).square().sum(), point, create_graph=True)
    return model(x).mean() + slope.square().sum(-1).mean()


def _residual_of_equation(model: nn.Module, points: Tensor) -> Tensor:
    def value(point: Tensor) -> Tensor:
        return model(point).squeeze(-1)

    curvature = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(value)))(points)
    return (curvature.diagonal(dim1=-2, dim2=-1).sum(-1) - 1.0).square().mean()


def _directional(model: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # torch compiles its own decompositions with the deprecated torch.jit.script on first use.
        warnings.simplefilter("ignore", DeprecationWarning)
        out, slope = torch.func.jvp(lambda point: model(point), (x,), (torch.ones_like(x),))
    return (out * slope).mean()


def _inner_step(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    def inner(parameters: dict[str, Any]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), labels)

    parameters = dict(model.named_parameters())
    slopes = torch.func.grad(inner)(parameters)
    return inner({name: value - 0.5 * slopes[name] for name, value in parameters.items()})


add(
    "loss_gradient_penalty",
    _mlp,
    floats(4),
    "torch.func.grad within the loss",
    loss=_gradient_penalty,
)
add(
    "loss_autograd_penalty",
    _mlp,
    floats(4),
    "torch.autograd.grad within the loss",
    loss=_autograd_penalty,
    may_refuse=r"autograd|torch\.func",
)
add(
    "loss_second_derivatives",
    lambda: _mlp(2, 1),
    floats(2),
    "a physics-informed loss: jacrev twice",
    loss=_residual_of_equation,
)
add(
    "loss_forward_mode",
    _mlp,
    floats(4),
    "torch.func.jvp within the loss",
    loss=_directional,
    may_refuse=r"jvp|forward.mode",
)
add(
    "loss_inner_gradient_step",
    _mlp,
    LABELLED,
    "a meta-learning step on the parameters themselves",
    loss=_inner_step,
    may_refuse=r"functional_call|torch\.func|nested",
)
