"""Compare the eager step and the captured loss of a family with a loop over its samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import _pytest.outcomes
import torch
from torch import Tensor, nn
from torch.func import functional_call

import clipgrad
from clipgrad.compiled import backend
from clipgrad.loss_graph import LossCapture
from tests.families._family import Batch, Family

SIZE = 4
# TorchInductor rounds otherwise than eager operations: exp and tanh in the last digits, and sums of float32 inside of
# float64 models. torch.compile of the ordinary loss of LoRA GPT-2 is off by 1.5e-9, and of Llama by 5.3e-8.
INDUCTOR_TOLERANCE = 1e-6
Loss = Callable[[dict[str, Tensor], Batch], Tensor]


@dataclass
class Row:
    """This class holds the results of one family as text."""

    name: str
    eager: str = ""
    captured: str = ""
    compiled: str = ""
    compiled_error: str = ""
    compile_seconds: float = 0.0
    error: str = ""
    on_rules: str = ""
    seconds: float = 0.0
    reason: str = ""


def measured(name: str, family: Family, *, compile: str | None = None) -> Row:
    """Return the row of a family, including the errors that it raises.

    Args:
        name: Of the family.
        family: To build.
        compile: ``"inductor"`` compiles the step, ``"trace"`` runs its traced graph as it is, None leaves it out.
    """
    row = Row(name)
    try:
        model, batch = family.build(SIZE)
    except _pytest.outcomes.Skipped as skipped:
        row.reason = str(skipped)
        return row
    params = trained(model)
    try:
        norms, max_norm, sums = by_a_loop(model, family, batch)
    except Exception as error:
        row.reason = f"no loop: {told(error)}"
        return row
    expected = norms, max_norm, sums
    whole = functional(model, family)
    row.eager, _, reason = compared(whole, params, batch, expected, family)
    if compile is not None:
        slack = INDUCTOR_TOLERANCE if compile == "inductor" else 0.0
        start = time.perf_counter()
        with nullcontext() if compile == "inductor" else untouched_graphs():
            row.compiled, row.compiled_error, reason_compiled = compared(
                whole, params, batch, expected, family, compile=True, slack=slack
            )
        row.compile_seconds = time.perf_counter() - start
        reason = reason or reason_compiled
    start = time.perf_counter()
    try:
        loss = captured(model, family, batch)
    except Exception as error:
        row.captured, row.reason = "refused", told(error)
        return row
    row.seconds = time.perf_counter() - start
    row.captured, row.error, why = compared(loss, params, batch, expected, family)
    row.reason = why or (f"eager: {reason}" if reason else "")
    if row.captured == "exact":
        row.on_rules = share_on_rules(loss, params, batch)
    return row


def untouched_graphs() -> AbstractContextManager[Any]:
    """Run traced graphs operation by operation instead of compiling them, which takes a minute each."""
    return mock.patch.object(backend, "compile_graph", lambda module, *_: module)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def functional(model: nn.Module, family: Family) -> Loss:
    """Return the family's loss as a function of parameters."""

    def loss(params: dict[str, Tensor], batch: Batch) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, params, args, kwargs)

        return family.loss(call, batch)  # type: ignore[arg-type]

    return loss


def captured(model: nn.Module, family: Family, batch: Batch) -> Loss:
    """Return the captured graph of the family's loss as a function of parameters."""
    params, one = trained(model), first_sample(batch)
    capture = LossCapture(family.loss)
    graph = capture.graph((model, one), list(params.values()), list(one.values()))

    def loss(params: dict[str, Tensor], batch: Batch) -> Tensor:
        return graph(list(params.values()), list(batch.values()), graph.constants)[0]

    return loss


def first_sample(batch: Batch) -> Batch:
    """Return a batch of the first sample alone."""
    return {name: value[:1].clone() for name, value in batch.items()}


def by_a_loop(
    model: nn.Module, family: Family, batch: Batch
) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Return each sample's gradient norm, a clipping norm in their middle, and the clipped sums of a loop."""
    params = trained(model)
    each = []
    for index in range(SIZE):
        one = {name: value[index : index + 1] for name, value in batch.items()}
        found = torch.autograd.grad(
            family.loss(model, one), list(params.values()), allow_unused=True
        )
        each.append(
            [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(found, params.values(), strict=True)
            ]
        )
    norms = torch.stack(
        [torch.stack([g.double().square().sum() for g in one]).sum().sqrt() for one in each]
    )
    max_norm = float(norms.median())
    if not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"norms are {norms.tolist()}")
    factors = (max_norm / norms).clamp(max=1.0)
    sums = {
        name: sum(float(c) * one[index].double() for c, one in zip(factors, each, strict=True))
        for index, name in enumerate(params)
    }
    return norms, max_norm, sums  # type: ignore[return-value]


def compared(
    loss: Loss,
    params: dict[str, Tensor],
    batch: Batch,
    expected: tuple[Tensor, float, dict[str, Tensor]],
    family: Family,
    *,
    compile: bool = False,
    slack: float = 0.0,
) -> tuple[str, str, str]:
    """Return verdict, largest relative error, and reason."""
    norms, max_norm, sums = expected
    try:
        copy = {name: value.clone() for name, value in batch.items()}
        gradient = clipgrad.clipped_grad(loss, max_grad_norm=max_norm, compile=compile)
        result = gradient(params, copy)
    except Exception as error:
        return "refused", "", told(error)
    assert isinstance(result.grad_norms, Tensor)
    of_norms = float(((result.grad_norms.double() - norms) / norms).abs().max())
    size = math.sqrt(sum(float(total.square().sum()) for total in sums.values()))
    of_sums = max(float((result.grads[n].double() - sums[n]).abs().max()) for n in sums) / size
    error = max(of_norms, of_sums)
    return ("exact" if error <= max(family.tolerance, slack) else "WRONG"), f"{error:.0e}", ""


def share_on_rules(loss: Loss, params: dict[str, Tensor], batch: Batch) -> str:
    """Return the percentage of elements whose parameters never use the fallback."""
    table = clipgrad.clipped_grad(loss, max_grad_norm=1.0).explain(params, batch)
    total = sum(p.numel() for p in params.values())
    slow = sum(math.prod(row.shape) for row in table.rows if "fallback" in row.by)
    return f"{100 * max(0.0, 1 - slow / total):.1f}"


def told(error: Exception) -> str:
    """Return the first sentence of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
