"""Opacus in three of its modes, each through ``PrivacyEngine.make_private``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers._common import adamw, require, trained
from benchmarks.peers._criteria import criterion
from benchmarks.step import NOISE_MULTIPLIER, PrivateStep, Setting
from benchmarks.workloads.transformer import CausalTransformer


class Opacus:
    """Modes "hooks" and "functorch": one backward pass, which leaves per-sample gradients behind."""

    def __init__(self, setting: Setting, mode: str) -> None:
        library = require("opacus", "opacus")
        self._setting = setting
        model, self._batch = setting.model_and_batch()
        self._parameters = trained(model)
        arguments: dict[str, Any] = {}
        if mode == "ghost":
            self._criterion = criterion(setting.workload)
            arguments["criterion"] = self._criterion.make()
        # One batch is the whole data set: the engine takes the expected batch size from the loader.
        loader = DataLoader(TensorDataset(*self._batch), batch_size=setting.batch_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Secure RNG turned off")
            self._module, self._optimizer, *rest = library.PrivacyEngine().make_private(
                module=_as_opacus_wants(model),
                optimizer=adamw(self._parameters.values()),
                data_loader=loader,
                noise_multiplier=NOISE_MULTIPLIER,
                max_grad_norm=setting.max_grad_norm,
                poisson_sampling=False,
                grad_sample_mode=mode,
                **arguments,
            )
        self._loss: Callable[..., Any] | None = rest[0] if mode == "ghost" else None

    def __call__(self) -> None:
        self._backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)  # per-sample gradients live until here

    def clipped_gradient(self) -> Mapping[str, Tensor]:
        self._backward()
        if self._loss is not None:
            self._optimizer.accumulate()  # the second backward pass has left the clipped sum in .grad
        else:
            self._optimizer.clip_and_accumulate()
        return {name: p.summed_grad for name, p in self._parameters.items()}

    def weights(self) -> Mapping[str, Tensor]:
        return self._parameters

    def _backward(self) -> None:
        if self._loss is None:
            self._setting.workload.loss(self._module, *self._batch).backward()
            return
        arguments, target = self._criterion.split(*self._batch)
        output = self._module(*arguments)
        if self._criterion.per_token:
            # With the shape, Opacus takes the mean over tokens itself: a sample is a sequence.
            loss = self._loss(output.flatten(0, 1), target.flatten(), shape=output.shape)
        else:
            loss = self._loss(output, target)
        loss.backward()


class _Positions(nn.Module):
    def __init__(self, positions: nn.Parameter) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class _Transformer(nn.Module):
    """``CausalTransformer`` without a parameter of its own.

    Opacus computes a module that owns a parameter and is no known layer by functorch, with all that lies within: of
    the model as it stands nothing would go through its rules. Who uses Opacus gives the parameter a module.
    """

    def __init__(self, model: CausalTransformer) -> None:
        super().__init__()
        self.tokens, self.positions = model.tokens, _Positions(model.positions)
        self.blocks, self.norm, self.head = model.blocks, model.norm, model.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.positions(self.tokens(ids))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _as_opacus_wants(model: nn.Module) -> nn.Module:
    """The same parameters and the same function, in modules that Opacus has rules for."""
    return _Transformer(model) if type(model) is CausalTransformer else model


def make(setting: Setting, mode: str) -> PrivateStep:
    return Opacus(setting, mode)
