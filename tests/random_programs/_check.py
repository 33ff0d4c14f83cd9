"""A program through clipgrad and through the definition: exact, refused, wrong, or an error of somebody else."""

from __future__ import annotations

import random
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipgrad
from clipgrad import Performance, PerLayer, clipped_grad, errors
from clipgrad.engine.reference import Params, per_sample_gradients_by_loop
from clipgrad.result import ClippedGradResult
from tests.clipping.reference import groups_of, scaled_sum
from tests.random_programs._program import Program
from tests.small_mlp import STRATEGIES

TOLERANCE, LOOSE = 1e-9, 2e-2
EXACT, REFUSED, WRONG, FOREIGN, VAGUE = "exact", "refused", "wrong", "foreign", "ill-conditioned"
OURS = tuple(e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception))
# An operation without a batching rule is looped over, which vmap announces; the other is PyTorch's about itself.
EXPECTED_WARNINGS = ("There is a performance drop", "Using padding='same' with even kernel")
PACKAGE = str(Path(clipgrad.__file__).parent)


@dataclass(frozen=True)
class Outcome:
    """What became of a program: one of the five words, and what there is to say."""

    kind: str
    detail: str = ""


def check(program: Program, runs: int = 3) -> Outcome:
    """Compare a program with the per-sample loop, with several ways of clipping.

    Args:
        program: What to run.
        runs: Number of settings drawn from the program's seed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        rng = random.Random(program.seed)
        try:
            truth = definition(program)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            return _without_gradient(program)
        for _ in range(runs):
            options = draw_options(rng, program, truth[1])
            mask = torch.rand(len(truth[0])) < 0.3 if rng.random() < 0.2 else None
            outcome = _run(program, options, mask, truth)
            if outcome.kind != EXACT:
                return outcome
    return Outcome(EXACT)


def _without_gradient(program: Program) -> Outcome:
    """A loss in which no parameter takes part has to be refused."""
    options = {"max_grad_norm": 1.0}
    if program.frozen_argument:
        options["batch_argnums"] = (2, 3, 4)
    first = (program.params, program.constants) if program.frozen_argument else (program.params,)
    try:
        clipped_grad(program.loss, **options)(*first, *program.batch)
    except errors.NotPerSampleError as error:
        return Outcome(REFUSED, str(error))
    return Outcome(WRONG, "no parameter takes part, and nothing was refused")


def definition(program: Program) -> tuple[Tensor, Params]:
    """Losses and gradients of each sample alone."""
    loss, constants = program.loss, program.constants

    def of_batch(p: Params, *batch: Tensor) -> Tensor:
        return loss(p, constants, *batch) if program.frozen_argument else loss(p, *batch)

    return per_sample_gradients_by_loop(of_batch, program.params, *program.batch)


def draw_options(rng: random.Random, program: Program, gradients: Params) -> dict[str, Any]:
    """Ways to ask for the same; the norms lie in the middle of the samples'."""
    layers = {name.split(".")[0] for name in program.params}
    whole = _middle(gradients, list(gradients))
    clipping: Any = rng.choice(("flat", "mapping", "layers"))
    if clipping == "flat":
        clipping = whole
    elif clipping == "layers":
        clipping = PerLayer(whole * 1.1, weights=rng.choice(("uniform", "size")))
    else:
        groups = sorted(layers)[1:] if rng.random() < 0.5 else sorted(layers)
        clipping = {
            g: _middle(gradients, [n for n in gradients if n.startswith(g)]) for g in groups
        }
        if len(groups) < len(layers):
            clipping[""] = whole
    options: dict[str, Any] = {
        "max_grad_norm": clipping,
    }
    performance = {"strategy": rng.choice(STRATEGIES)}
    options["microbatch_size"] = rng.choice((None, 1, 2, 3, len(program.batch[0])))
    if program.frozen_argument:
        options["batch_argnums"] = (2, 3, 4)
    options["performance"] = Performance(**performance)
    return options


def _middle(gradients: Params, names: list[str]) -> float:
    norms = [
        torch.stack([gradients[name][i].norm() for name in names]).norm()
        for i in range(len(gradients[names[0]]))
    ]
    return 1.01 * float(torch.stack(norms).median()) + 1e-3


def _run(
    program: Program, options: dict[str, Any], mask: Tensor | None, truth: tuple[Tensor, Params]
) -> Outcome:
    said = f"{options}{'' if mask is None else f', is_padding={mask.tolist()}'}"
    try:
        gradient = clipped_grad(program.loss, **options)
        result = gradient(program.params, *program.args, is_padding=mask)
    except Exception as error:
        if ours(error):
            return Outcome(REFUSED, f"{type(error).__name__}: {error}")
        return Outcome(FOREIGN, f"{said}\n" + "".join(traceback.format_exception(error)[-6:]))
    problems = _differences(program, options, mask, result, truth)
    if not problems:
        return Outcome(EXACT)
    kind = VAGUE if _ill_conditioned(program, truth[1]) else WRONG
    return Outcome(kind, f"{said}\n" + "\n".join(problems))


def ours(error: Exception) -> bool:
    """An error that clipgrad raised on purpose."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, OURS) or (
        type(error) is ValueError and frames[-1].filename.startswith(PACKAGE)
    )


def _differences(
    program: Program,
    options: dict[str, Any],
    mask: Tensor | None,
    result: ClippedGradResult,
    truth: tuple[Tensor, Params],
) -> list[str]:
    losses, gradients = truth
    groups = groups_of(options["max_grad_norm"], program.params)
    rows = torch.ones(len(losses), dtype=torch.bool) if mask is None else ~mask
    norms = scaled_sum(gradients, groups)[1]
    sums = {name: torch.zeros_like(p) for name, p in program.params.items()}
    if rows.any():
        sums = scaled_sum({name: g[rows] for name, g in gradients.items()}, groups)[0]
    found = result.grad_norms
    tolerance = LOOSE if program.loose else TOLERANCE
    problems = [_difference("losses", result.values[rows], losses[rows], tolerance)]
    for group, expected in norms.items():
        actual = found if isinstance(found, Tensor) else found[group]
        problems.append(_difference(f"norms of {group!r}", actual[rows], expected[rows], tolerance))
    problems += [_difference(f"sum of {n!r}", result.grads[n], sums[n], tolerance) for n in sums]
    return [problem for problem in problems if problem]


def _difference(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> str:
    if actual.shape != expected.shape:
        return f"{what}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    if not expected.numel():
        return ""
    scale = max(1.0, float(expected.nan_to_num().abs().max()))
    error = float((actual - expected).abs().max()) / scale
    if error <= tolerance or torch.equal(actual.isnan(), expected.isnan()) & bool(error != error):
        return ""
    return f"{what}: off by {error:.1e}: {actual.flatten()[:4].tolist()} for {expected.flatten()[:4].tolist()}"


def _ill_conditioned(program: Program, gradients: Params) -> bool:
    """Whether the definition itself moves as much when its parameters change in the last digits."""
    nudged = {name: p * (1 + 1e-13) for name, p in program.params.items()}
    moved = definition(_with(program, nudged))[1]
    return any(_difference(name, moved[name], gradients[name], 1e-10) != "" for name in gradients)


def _with(program: Program, params: Params) -> Program:
    return replace(program, params=params)
