"""Compute the white-box score: how far each step moved along a canary's own clipped gradient."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from clipgrad.audit._losses import count, rng_restored
from clipgrad.clipping import Relation
from clipgrad.optimizer import DPOptimizer

Observed = Literal["parameters", "gradients"]


class StepRecorder:
    """This class watches ``optimizer.step()`` and scores canaries: the white-box attack of Steinke et al. 2023.

    For each step and canary it computes the scalar product of the step with the canary's clipped gradient at the
    parameters before the step. A canary in the batch pulls the step in its direction. The strongest canaries have
    gradients at least as long as the clipping norm and orthogonal to all others, for example a rare token, or an image
    of random pixels with a random label.

    The recorder changes nothing about the training, including the RNG state. A step costs a copy of the parameters and
    a per-sample gradient of each canary. Gradients are ``vmap(grad)``, the definition, instead of clipgrad's fast path,
    so that an audit shares no code with what it audits.

    The products depend only on the canaries and on what the run releases; they are as private as the parameters after
    every step, not as the final parameters alone.

    Args:
        optimizer: The optimizer whose steps are watched; its model and loss are used.
        *canaries: All canaries, including those left out of training, in the form that ``optimizer.backward`` takes:
            pytrees of tensors, ``[m, ...]``, on the model's device.
        observe: What counts as the step. ``"parameters"``: parameters before minus parameters after, which is all that
            is released; with plain SGD and a constant learning rate this is the noisy sum. ``"gradients"``: the noisy
            gradient that the wrapped optimizer received; it is as private, and shows more under adaptive optimizers and
            schedules.
        chunk_size: Number of canaries at a time, whose gradients must fit into memory. 1 does not use ``vmap``, for
            losses that do not support it.

    Raises:
        ValueError: If ``canaries`` are not tensors of one length, or an option is unknown.

    Examples:
        >>> import clipgrad
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = clipgrad.DPOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     model,
        ...     lambda model, x: model(x).sum(),
        ...     max_grad_norm=1.0,
        ...     noise_multiplier=1.0,
        ...     expected_batch_size=8,
        ... )
        >>> recorder = StepRecorder(optimizer, torch.eye(3))
        >>> for _ in range(2):
        ...     loss = optimizer.backward(torch.randn(8, 3))
        ...     with recorder:
        ...         optimizer.step()
        ...     optimizer.zero_grad()
        >>> recorder.products.shape, recorder.scores().shape
        (torch.Size([2, 3]), torch.Size([3]))
    """

    def __init__(
        self,
        optimizer: DPOptimizer,
        *canaries: Any,
        observe: Observed = "parameters",
        chunk_size: int = 64,
    ) -> None:
        self._size = count(canaries)
        if observe not in ("parameters", "gradients"):
            raise ValueError(f"observe must be 'parameters' or 'gradients', got {observe!r}.")
        if type(chunk_size) is not int or chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}.")
        self._optimizer = optimizer
        self._canaries = canaries
        self._observe = observe
        self._chunk_size = chunk_size
        self._before: dict[str, Tensor] | None = None
        self._products: list[Tensor] = []

    def __enter__(self) -> StepRecorder:
        self._before = {name: p.detach().clone() for name, p in self._trained().items()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        before, self._before = self._before, None
        if kind is None and before is not None:
            self._products.append(self._product(before, self._step(before)))

    @property
    def products(self) -> Tensor:
        """Return the scalar product of each step with each canary's clipped gradient, ``[steps, m]``, float64.

        Other attacks can use it: any function of the products and the canaries is a score if it does not use the coins.
        """
        if not self._products:
            return torch.zeros(0, self._size, dtype=torch.float64)
        return torch.stack(self._products)

    def scores(self) -> Tensor:
        """Return the sum of the products over all steps so far, ``[m]``."""
        return self.products.sum(0)

    def _trained(self) -> dict[str, nn.Parameter]:
        owned = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        named = self._optimizer.model.named_parameters()
        return {name: p for name, p in named if id(p) in owned and p.requires_grad}

    def _step(self, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the negated step, which points in the direction of a gradient."""
        trained = self._trained()
        if self._observe == "parameters":
            return {name: old - trained[name].detach() for name, old in before.items()}
        gradients = {name: trained[name].grad for name in before}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            raise ValueError(
                f"observe='gradients' found no gradient of {missing[0]!r}; call only optimizer.step() inside "
                "`with recorder:`, and zero_grad() outside."
            )
        return {name: g.detach() for name, g in gradients.items() if g is not None}

    def _product(self, params: dict[str, Tensor], step: dict[str, Tensor]) -> Tensor:
        whole = _Loss(self._optimizer.model, self._optimizer.loss_fn)

        def loss(params: dict[str, Tensor], sample: tuple[Any, ...]) -> Tensor:
            named = {f"model.{name}": p for name, p in params.items()}
            found: Tensor = functional_call(whole, named, tree_map(lambda leaf: leaf[None], sample))
            return found.sum()  # a batch of one: the sum is the mean

        def along(sample: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            gradients = grad(loss)(params, sample)
            norm = sum(g.double().square().sum() for g in gradients.values())
            product = sum((g.double() * step[n].double()).sum() for n, g in gradients.items())
            return product, norm

        with rng_restored(self._optimizer.model):
            if self._chunk_size == 1:
                each = [
                    along(tree_map(lambda leaf, i=i: leaf[i], self._canaries))
                    for i in range(self._size)
                ]
                product, squared = (torch.stack(column) for column in zip(*each, strict=True))
            else:
                product, squared = vmap(along, randomness="different", chunk_size=self._chunk_size)(
                    self._canaries
                )
        # The largest norm of a clipped gradient; several groups are treated as one.
        moves = 2 if self._optimizer.relation is Relation.REPLACE_ONE else 1
        bound = self._optimizer.sensitivity / moves
        clipped = product * (bound / squared.sqrt()).clamp(max=1.0)
        # A canary whose gradient is not finite contributes nothing to training.
        return torch.where(clipped.isfinite() & squared.isfinite(), clipped, 0.0).cpu()


class _Loss(nn.Module):
    """This module computes the loss, so that ``functional_call`` can replace the parameters that the loss reads."""

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, *batch: Any) -> Any:
        return self.loss_fn(self.model, *batch)
