"""What digits.py compares clipgrad with: ``vmap(grad)``, and a stopwatch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.func import functional_call, grad, vmap


class VmapDPOptimizer:
    """The part of ``clipgrad.DPOptimizer`` that the demo uses, with every gradient materialised.

    Per-sample gradients are computed as PyTorch's own tutorial on them does:
    https://docs.pytorch.org/tutorials/intermediate/per_sample_grads.html
    """

    def __init__(
        self,
        optimizer,
        model,
        loss_fn,
        *,
        plan,
        noise=None,
    ):
        self.optimizer = optimizer
        self.parameters = dict(model.named_parameters())
        self.max_grad_norm = plan.max_grad_norm
        self.sigma = plan.noise_multiplier * plan.max_grad_norm
        self.expected_batch_size = plan.expected_batch_size
        self.noise = noise

        def loss_of_one(parameters, image, label):
            def forward(images):
                return functional_call(model, parameters, (images,))

            return loss_fn(forward, image.unsqueeze(0), label.unsqueeze(0))

        self.gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")

    def backward(self, images, labels):
        if len(labels) == 0:  # vmap takes no empty batch
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            return
        detached = {name: parameter.detach() for name, parameter in self.parameters.items()}
        gradients = self.gradients(detached, images, labels)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factors = (self.max_grad_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
        for name, parameter in self.parameters.items():
            parameter.grad = torch.tensordot(factors, gradients[name], dims=1)

    def step(self):
        for parameter in self.parameters.values():
            if self.noise is not None:
                self.noise.add_gaussian_([parameter.grad], self.sigma)
            else:  # PyTorch's own noise: quick, but not for production
                parameter.grad.add_(torch.randn_like(parameter), alpha=self.sigma)
            parameter.grad.div_(self.expected_batch_size)
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()


def samples_per_second(
    steps: Mapping[str, Callable[[], None]], batch_size: int, rounds: int, warmups: int = 2
) -> dict[str, float]:
    """Medians; the contestants take turns, so that a busy spell of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmups + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: batch_size / statistics.median(s[warmups:]) for name, s in seconds.items()}
