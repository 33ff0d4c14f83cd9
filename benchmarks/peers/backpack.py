"""BackPACK: per-sample gradients of a list of layers, after its example "Differentially Private SGD".

The example multiplies a gradient by min(||g|| / C, 1), which is no clipping; here the factor is min(C / ||g||, 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.peers._common import adamw, clip_factors, publish_noisy, require, trained
from benchmarks.peers._criteria import criterion
from benchmarks.step import PrivateStep, Setting, Unavailable


class BackPACK:
    def __init__(self, setting: Setting) -> None:
        self._library = require("backpack", "backpack-for-pytorch")
        self._extension = require("backpack.extensions", "backpack-for-pytorch").BatchGrad
        self._setting = setting
        self._criterion = criterion(setting.workload)
        model, self._batch = setting.model_and_batch()
        self._parameters = trained(model)
        self._optimizer = adamw(self._parameters.values())
        self._model = self._library.extend(model)
        self._loss = self._library.extend(self._criterion.make())

    def __call__(self) -> None:
        publish_noisy(self.clipped_gradient(), self._parameters, self._setting)
        self._optimizer.step()

    def clipped_gradient(self) -> Mapping[str, Tensor]:
        self._optimizer.zero_grad()
        self._backward()
        self._refuse_what_it_left_out()
        parts = {name: p.grad_batch for name, p in self._parameters.items()}
        # Of a mean over the batch, BackPACK's per-sample gradients carry a factor 1 / B.
        size = self._setting.batch_size
        factors = size * clip_factors(parts.values(), self._setting.max_grad_norm / size)
        for p in self._parameters.values():
            del p.grad_batch
        return {name: torch.tensordot(factors, g, 1) for name, g in parts.items()}

    def weights(self) -> Mapping[str, Tensor]:
        return self._parameters

    def _refuse_what_it_left_out(self) -> None:
        """BackPACK only warns of a layer that it has no rule for."""
        left_out = {
            type(module).__name__
            for module in self._model.modules()
            if any(not hasattr(p, "grad_batch") for p in module.parameters(recurse=False))
        }
        if left_out:
            names = ", ".join(sorted(left_out))
            raise Unavailable(f"BackPACK computes no per-sample gradients for {names}")

    def _backward(self) -> None:
        arguments, target = self._criterion.split(*self._batch)
        output = self._model(*arguments)
        if self._criterion.per_token:
            output, target = output.flatten(0, 1), target.flatten()
        loss = self._loss(output, target)
        with self._library.backpack(self._extension()):
            loss.backward()


def make(setting: Setting) -> PrivateStep:
    return BackPACK(setting)
