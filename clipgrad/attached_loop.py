"""``attach``: an ordinary loop over model, criterion, ``loss.backward()`` and ``step`` becomes private as it stands."""

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
    """What takes the places of model, optimizer and criterion in the loop.

    Attributes:
        model: Calls the model, and remembers with what.
        optimizer: The ``DPOptimizer``.
        criterion: Calls the criterion on the model's output, and returns a loss with a ``backward`` of its own.
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

    ``loss.backward()`` computes the gradient of ``criterion(model(x), y)`` on each sample in a batch of one, as
    ``DPOptimizer`` does. So it is exact for every criterion and reduction, and nothing is guessed about the batch axis,
    which comes first. The forward pass of the loop has no gradients and is for its values alone; it takes about a third
    of a step. Where the loop does more than that between model and ``backward``, it is refused.

    Args:
        model: The model. Without ``criterion`` it returns its loss as ``output.loss``, as models of Hugging Face do.
        optimizer: The optimizer of the loop.
        criterion: The criterion of the loop. It takes the model's output, unchanged, as its first argument. What it
            takes besides has a batch axis.
        plan: The plan of the run; ``poisson_loader(dataset, plan=plan)`` makes the loop's batches.
        microbatch_size: As for ``DPOptimizer``.
        noise: As for ``DPOptimizer``.
        compile: As for ``DPOptimizer``.
        performance: As for ``DPOptimizer``.

    Returns:
        What the loop uses as model, optimizer and criterion from now on.

    Raises:
        ValueError: If an argument does not fit.

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
            f"criterion must be a function of the model's output and the target, got {type(criterion).__name__}."
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
    """The model of an attached loop. In evaluation, and where gradients are off, it is the model itself."""

    def __init__(
        self, model: nn.Module, optimizer: DPOptimizer[Any], *, returns_loss: bool
    ) -> None:
        self._model, self._optimizer, self._returns_loss = model, optimizer, returns_loss
        self._last: tuple[Any, _Call] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without gradients, and remember its input for ``backward``."""
        if not (self._model.training and torch.is_grad_enabled()):
            return self._model(*args, **kwargs)
        call = _Call(self._optimizer, {"args": args, "kwargs": kwargs}, _autocasts())
        with torch.no_grad():
            output = self._model(*args, **kwargs)
        if self._returns_loss:
            if not isinstance(getattr(output, "loss", None), Tensor):
                raise ValueError(
                    f"the model returned a {type(output).__name__} without .loss. Call it with labels, or give "
                    "attach(model, optimizer, criterion, ...) the criterion."
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
        """Return the call that returned this very object, if it is the last one."""
        return self._last[1] if self._last is not None and self._last[0] is output else None


class _Call(NamedTuple):
    optimizer: DPOptimizer[Any]
    inputs: Mapping[str, Any]
    autocasts: list[tuple[str, torch.dtype]]


class _AttachedCriterion:
    """The criterion of an attached loop; on other values than outputs in training it is the criterion itself."""

    def __init__(self, model: AttachedModel, criterion: Criterion | None) -> None:
        self._model, self._criterion = model, criterion

    def __call__(self, output: Any, *targets: Any) -> Any:
        if self._criterion is None:
            raise ValueError(
                "attach was given no criterion; use the model's own loss: output.loss."
            )
        call = self._model.call_of(output)
        if call is None:
            if torch.is_grad_enabled() and self._model.training:
                raise NotPerSampleError(
                    "criterion received something else than the output of the last model(...), so the loss of one "
                    "sample is not known. Do what comes between them in the criterion that you give to attach."
                )
            return self._criterion(output, *targets)
        with torch.no_grad():
            value = self._criterion(tree_map(_plain, output), *targets)
        return AttachedLoss.of(value, call, targets)


class AttachedLoss(Tensor):
    """The loss of an attached loop: a number to look at, and ``backward``. **Not private**."""

    _run: tuple[_Call, tuple[Any, ...], int] | None

    @staticmethod
    def of(value: Tensor, call: _Call, targets: tuple[Any, ...]) -> AttachedLoss:
        """Return a loss that was computed without gradients."""
        loss = value.detach().as_subclass(AttachedLoss)
        loss._run = call, targets, loss._version
        return loss

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Add the clipped per-sample gradients of the batch to the sums of the optimizer, once.

        Raises:
            NotPerSampleError: If the loss was scaled, or anything else was made of it.
        """
        run = self.__dict__.get("_run")
        if run is None or run[2] != self._version or args or kwargs:
            raise NotPerSampleError(
                "backward was called a second time, with arguments, or on something computed from the loss (a sum, a "
                "scaled loss), whose gradient by sample is not known. Call loss.backward() once; put what belongs to "
                "the loss into the criterion, accumulate by microbatch_size, and leave out GradScaler."
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
    """Lets an output look as in every loop, and refuses a gradient that reaches it past the attached criterion."""

    @staticmethod
    def forward(context: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        raise NotPerSampleError(
            "loss.backward() was called on a loss that the attached criterion did not compute, so gradients of single "
            "samples are not known. Use the criterion that attach returned, on the model's output as it is."
        )


def _marked(output: Tensor) -> Tensor:
    if not output.is_floating_point():
        return output
    marked: Tensor = _NotALoss.apply(output, torch.zeros((), requires_grad=True))
    return marked


def _plain(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
