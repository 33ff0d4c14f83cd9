"""Per-sample gradients as PyTorch's own tutorial computes them: no library at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.peers._common import adamw, clip_factors, functional_loss, publish_noisy, trained
from benchmarks.step import PrivateStep, Setting


class VmapGrad:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model, self._batch = setting.model_and_batch()
        self._parameters = trained(self._model)
        self._optimizer = adamw(self._parameters.values())
        loss = functional_loss(setting.workload, self._model)

        def one_sample(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
            return loss(parameters, *(leaf[None] for leaf in sample))

        in_dims = (None, *[0] * len(self._batch))
        self._per_sample = vmap(grad(one_sample), in_dims=in_dims, randomness="different")

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        publish_noisy(self.clipped_gradient(), self._parameters, self._setting)
        self._optimizer.step()

    def clipped_gradient(self) -> Mapping[str, Tensor]:
        gradients = self._per_sample(
            {name: p.detach() for name, p in self._parameters.items()}, *self._batch
        )
        factors = clip_factors(gradients.values(), self._setting.max_grad_norm)
        return {name: torch.tensordot(factors, g, 1) for name, g in gradients.items()}

    def weights(self) -> Mapping[str, Tensor]:
        return self._parameters


def make(setting: Setting) -> PrivateStep:
    return VmapGrad(setting)
