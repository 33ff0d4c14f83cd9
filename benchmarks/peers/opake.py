"""opake: functional DP-SGD on torch.func, after its user guide "DP-SGD end-to-end"."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from benchmarks.peers._common import require
from benchmarks.step import LEARNING_RATE, NOISE_MULTIPLIER, SEED, PrivateStep, Setting


class Opake:
    """No microbatches and no torch.compile, neither of which the guide starts with.

    Its runtime patches serve checkpointing, Hugging Face models and Triton kernels of theirs: nothing that is measured
    here, and they would reach into every other mode of the process.
    """

    def __init__(self, setting: Setting) -> None:
        clipping = require("opake.dpsgd.clipping", "opake")
        noise = require("opake.dpsgd.noise", "opake")
        functional = require("opake.functional", "opake")
        optimizers = require("opake.optimizers", "opake")
        random = require("opake.random", "opake")
        self._apply_updates = require("torchopt", "opake").apply_updates

        model, self._batch = setting.model_and_batch()
        module, self._parameters, _ = functional.make_functional(model, partition_trainable=True)
        self._batch_size = setting.batch_size

        def loss_fn(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
            def call(*arguments: Tensor) -> Tensor:
                output: Tensor = module(parameters, *arguments)
                return output

            return setting.workload.loss(call, *(leaf[None] for leaf in sample))

        self._gradient, self._clip_state = clipping.clipped_grad(
            loss_fn,
            clipping_norm=setting.max_grad_norm,
            batch_argnums=tuple(range(1, 1 + len(self._batch))),
            normalize_by=setting.batch_size,
        )
        self._noise, self._noise_state = noise.gaussian_noise(
            noise_multiplier=NOISE_MULTIPLIER, key=random.key(SEED)
        )
        self._optimizer = optimizers.adamw(lr=LEARNING_RATE, weight_decay=0.01)
        self._optimizer_state = self._optimizer.init(self._parameters)

    def __call__(self) -> None:
        clipped, self._clip_state = self._gradient(
            self._parameters, *self._batch, state=self._clip_state
        )
        noisy, self._noise_state = self._noise(clipped, self._noise_state)
        updates, self._optimizer_state = self._optimizer.update(
            noisy, self._optimizer_state, params=self._parameters
        )
        self._parameters = self._apply_updates(self._parameters, updates)

    def clipped_gradient(self) -> Mapping[str, Tensor]:
        clipped, _ = self._gradient(self._parameters, *self._batch, state=self._clip_state)
        return {name: g * self._batch_size for name, g in clipped.pytree.items()}

    def weights(self) -> Mapping[str, Tensor]:
        return self._parameters


def make(setting: Setting) -> PrivateStep:
    return Opake(setting)
