"""Define ``attach``, which makes a loop of model, criterion, ``loss.backward()`` and ``step`` private, unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from clipgrad.errors import NotPerSampleError
from clipgrad.noise import NoiseSource
from clipgrad.optimizer import DPOptimizer
from clipgrad.options import Performance
from clipgrad.plan import PrivacyPlan

Criterion = Callable[..., Any]


class Attached(NamedTuple):
    """This tuple holds the replacements for model, optimizer and criterion of the loop.

    Attributes:
        model: Calls the model, and keeps its input for ``backward``.
        optimizer: The ``DPOptimizer``.
        criterion: Calls the criterion on the model's output, and returns an ``AttachedLoss``.
    """

    model: AttachedModel
    optimizer: DPOptimizer[Any]
    criterion: Criterion


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Criterion | None = None,
    *,
    plan: PrivacyPlan,
    microbatch_size: int | str | None = None,
    noise: NoiseSource | None = None,
    compile: bool | str = False,
    performance: Performance | None = None,
) -> Attached:
    """Make the loop ``loss = criterion(model(x), y); loss.backward(); optimizer.step()`` private, unchanged.

    ``loss.backward()`` computes the gradient of ``criterion(model(x), y)`` on each sample as a batch of one, as
    ``DPOptimizer`` does. So it is exact for every criterion and reduction. The batch axis is the first axis of every
    tensor. The loop's own forward pass has no gradients and only provides values; it takes about a third of a step. A
    loop that computes anything else between the model and ``backward`` is refused.

    Args:
        model: The model. Without ``criterion`` it returns its loss as ``output.loss``, as models of Hugging Face do.
        optimizer: The optimizer of the loop.
        criterion: The criterion of the loop. Its first argument is the model's unchanged output. Its other arguments
            have a batch axis.
        plan: The plan of the run; ``poisson_loader(dataset, plan=plan)`` makes the loop's batches.
        microbatch_size: Number of samples of a microbatch, see ``DPOptimizer``.
        noise: The noise source, see ``DPOptimizer``.
        compile: Whether steps are compiled, see ``DPOptimizer``.
        performance: See ``DPOptimizer``.

    Returns:
        The model, optimizer and criterion that the loop must use.

    Raises:
        ValueError: If ``criterion`` is not callable, or ``DPOptimizer`` refuses an argument.

    Examples:
        >>> import torch, clipgrad
        >>> data = torch.utils.data.TensorDataset(torch.randn(100, 3), torch.randn(100, 1))
        >>> plan = clipgrad.PrivacyPlan(
        ...     num_samples=100, expected_batch_size=10, steps=3, delta=1e-3, noise_multiplier=1.0
        ... )
        >>> model, criterion = torch.nn.Linear(3, 1), torch.nn.MSELoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer, criterion = clipgrad.attach(model, optimizer, criterion, plan=plan)
        >>> for x, y in clipgrad.poisson_loader(data, plan=plan):
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.ledger.steps
        3
    """
    if criterion is not None and not callable(criterion):
        raise ValueError(
            f"criterion must be a function of the model's output and the target, got {type(criterion).__name__}. Pass "
            "a loss such as torch.nn.CrossEntropyLoss()."
        )

    def loss_fn(model: nn.Module, call: Mapping[str, Any], targets: tuple[Any, ...]) -> Any:
        output = model(*call["args"], **call["kwargs"])
        return output.loss if criterion is None else criterion(output, *targets)

    private = DPOptimizer(
        optimizer,
        model,
        loss_fn,
        plan=plan,
        microbatch_size=microbatch_size,
        noise=noise,
        compile=compile,
        performance=performance,
    )
    attached = AttachedModel(model, private, returns_loss=criterion is None)
    return Attached(attached, private, _AttachedCriterion(attached, criterion))


class AttachedModel:
    """This class calls the model of an attached loop; in evaluation and without gradients the call is unchanged."""

    def __init__(
        self, model: nn.Module, optimizer: DPOptimizer[Any], *, returns_loss: bool
    ) -> None:
        self._model, self._optimizer, self._returns_loss = model, optimizer, returns_loss
        self._last: tuple[Any, _Call] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without gradients, and keep its input for ``backward``."""
        if not (self._model.training and torch.is_grad_enabled()):
            return self._model(*args, **kwargs)
        call = _Call(self._optimizer, {"args": args, "kwargs": kwargs}, _autocasts())
        with torch.no_grad():
            output = self._model(*args, **kwargs)
        if self._returns_loss:
            if not isinstance(getattr(output, "loss", None), Tensor):
                raise ValueError(
                    f"the model returned a {type(output).__name__} without .loss. Call it with labels, or pass the "
                    "criterion: attach(model, optimizer, criterion, ...)."
                )
            output = copy.copy(output)
            output.loss = AttachedLoss.of(output.loss, call, ())
            return output
        marked = tree_map(lambda leaf: _marked(leaf) if isinstance(leaf, Tensor) else leaf, output)
        self._last = marked, call
        return marked

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute."""
        if name == "_model":
            raise AttributeError(name)
        return getattr(self._model, name)

    def call_of(self, output: Any) -> _Call | None:
        """Return the last call of the model if it returned this object, or None."""
        return self._last[1] if self._last is not None and self._last[0] is output else None


class _Call(NamedTuple):
    optimizer: DPOptimizer[Any]
    inputs: Mapping[str, Any]
    autocasts: list[tuple[str, torch.dtype]]


class _AttachedCriterion:
    """This class calls the criterion of an attached loop; outside of training the call is unchanged."""

    def __init__(self, model: AttachedModel, criterion: Criterion | None) -> None:
        self._model, self._criterion = model, criterion

    def __call__(self, output: Any, *targets: Any) -> Any:
        if self._criterion is None:
            raise ValueError(
                "attach was given no criterion. Pass one, or use the model's own loss: output.loss."
            )
        call = self._model.call_of(output)
        if call is None:
            if torch.is_grad_enabled() and self._model.training:
                raise NotPerSampleError(
                    "criterion received something else than the output of the last model(...), so the loss of one "
                    "sample is not known. Do what comes between them in the criterion that you pass to attach."
                )
            return self._criterion(output, *targets)
        with torch.no_grad():
            value = self._criterion(tree_map(_plain, output), *targets)
        return AttachedLoss.of(value, call, targets)


class AttachedLoss(Tensor):
    """This tensor is the loss of an attached loop, and its ``backward`` clips per sample; it is **not private**."""

    _run: tuple[_Call, tuple[Any, ...], int] | None

    @staticmethod
    def of(value: Tensor, call: _Call, targets: tuple[Any, ...]) -> AttachedLoss:
        """Return ``value`` as an attached loss; it was computed without gradients."""
        loss = value.detach().as_subclass(AttachedLoss)
        loss._run = call, targets, loss._version
        return loss

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Add the clipped per-sample gradients of the batch to the sums of the optimizer, once.

        Raises:
            NotPerSampleError: If it is called twice, with arguments, or on a value computed from the loss.
        """
        run = self.__dict__.get("_run")
        if run is None or run[2] != self._version or args or kwargs:
            raise NotPerSampleError(
                "backward was called a second time, with arguments, or on a value computed from the loss (a sum, a "
                "scaled loss), whose per-sample gradient is not known. Call loss.backward() once; put what belongs to "
                "the loss into the criterion, accumulate with microbatch_size, and leave out GradScaler."
            )
        self._run = None
        call, targets, _ = run
        with ExitStack() as stack:
            for device, dtype in call.autocasts:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            call.optimizer.backward(call.inputs, targets)


def _autocasts() -> list[tuple[str, torch.dtype]]:
    kinds = ("cpu", "cuda")
    return [(k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)]


class _NotALoss(torch.autograd.Function):
    """This function gives an output a ``grad_fn``, and refuses a gradient that does not come from the criterion."""

    @staticmethod
    def forward(context: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        raise NotPerSampleError(
            "loss.backward() was called on a loss that the attached criterion did not compute, so per-sample gradients "
            "are not known. Use the criterion that attach returned, on the model's unchanged output."
        )


def _marked(output: Tensor) -> Tensor:
    if not output.is_floating_point():
        return output
    marked: Tensor = _NotALoss.apply(output, torch.zeros((), requires_grad=True))
    return marked


def _plain(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
