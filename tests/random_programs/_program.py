"""A whole program from a seed: its text, its parameters and its batch."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipgrad.engine.reference import Params
from tests.random_programs._draft import ELEMENTS, LARGEST, NAMES, RANK, WORDS, Draft
from tests.random_programs._layers import LAYERS
from tests.random_programs._others import OTHERS

CLASSES = 3
FINAL = (
    "uneven({h})",
    "({h} - 0.3).square().mean()",
    "torch.nn.functional.mse_loss({h}, {w})",
    "F.cross_entropy({r}, y)",
    "F.cross_entropy({r}, y, label_smoothing=0.1, reduction='sum')",
    "F.cross_entropy({r}, y, weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))",
    "F.cross_entropy({r}, y, ignore_index=1, reduction='sum')",
    "F.cross_entropy({r}, {r}.detach().tanh().softmax(-1))",
    "F.nll_loss({r}.log_softmax(-1), y)",
    "F.multi_margin_loss({r}, y)",
    "F.multilabel_soft_margin_loss({h}, ({h} > 0).double())",
    "F.binary_cross_entropy_with_logits({h}, ({h} > 0.2).double())",
    "F.binary_cross_entropy({h}.sigmoid(), torch.full_like({h}, 0.3))",
    "F.smooth_l1_loss({h}, {w}, reduction='sum')",
    "F.huber_loss({h}, {w} * 2)",
    "F.l1_loss({h}, {w} + 0.1)",
    "F.kl_div({h}.log_softmax(-1), torch.full_like({h}, 0.3), reduction='batchmean')",
    "F.soft_margin_loss({h}, ({h} > 0.2).double() * 2 - 1)",
    "F.hinge_embedding_loss({h}, ({h} > 0.2).double() * 2 - 1)",
    "F.cosine_embedding_loss({r}, {r}.detach() + 1, torch.ones(1))",
    "F.margin_ranking_loss({h}, {h} * 0.5, torch.ones_like({h}))",
    "F.triplet_margin_loss({r}, {r} * 0.5 + 1, {r}.detach() - 1)",
    "F.poisson_nll_loss({h}, torch.ones_like({h}))",
    "F.gaussian_nll_loss({h}, {h}.detach() + 1, torch.ones_like({h}))",
    "({r}.logsumexp(-1) - {r}[torch.arange(1), y]).sum()",
    "-{r}.log_softmax(-1).gather(-1, y[:, None]).mean()",
    "({h}.sin() + {h}.square().sum().sqrt()).sum()",
)


@dataclass(frozen=True)
class Program:
    """A loss, what it is called with, and how clipgrad is asked to clip it.

    Attributes:
        lines: Target and expression, in order; the last target is ``return``.
        loose: No more than a few digits agree.
        asks: The program asks for the value of a tensor.
        frozen_argument: The frozen tensors come as an argument, instead of from outside.
    """

    seed: int
    lines: tuple[tuple[str, str], ...]
    params: Params
    constants: dict[str, Tensor]
    batch: tuple[Tensor, ...]
    loose: bool
    asks: bool
    frozen_argument: bool

    @property
    def text(self) -> str:
        head = "def loss(p, c, x, ids, y):" if self.frozen_argument else "def loss(p, x, ids, y):"
        body = [
            f"return {value}" if target == "return" else f"{target} = {value}" if target else value
            for target, value in self.lines
        ]
        return "\n    ".join([head, *body])

    @property
    def loss(self) -> Callable[..., Tensor]:
        """``loss(p, *args)``; the first of ``args`` are the constants with ``frozen_argument``."""
        names: dict[str, Any] = {**NAMES, "c": self.constants}
        exec(self.text, names)
        made: Callable[..., Tensor] = names["loss"]
        return made

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.constants, *self.batch) if self.frozen_argument else self.batch

    def describe(self) -> str:
        used = {name: p for name, p in self.params.items() if f'"{name}"' in self.text}
        kept = {name: c for name, c in self.constants.items() if f'"{name}"' in self.text}
        shapes = [f"{name}: {list(t.shape)}" for name, t in (used | kept).items()]
        batch = ", ".join(
            f"{name} {list(t.shape)}" for name, t in zip(("x", "ids", "y"), self.batch, strict=True)
        )
        return f"# seed {self.seed}; {batch}; {'; '.join(shapes)}\n{self.text}"


def make_program(seed: int) -> Program:
    """The program of a seed; equal on every call."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is drawn here is not clipgrad's yet
        torch.manual_seed(seed)
        while True:
            made = _attempt(rng, seed)
            if made is not None:
                return made


def _attempt(rng: random.Random, seed: int) -> Program | None:
    """A program, or None where its loss is not finite or depends on no parameter."""
    draft = Draft(rng)
    axes = rng.choices((1, 2, 3, 4), (3, 5, 3, 1))[0]
    sizes = [0 if draft.coin(0.01) else draft.size() for _ in range(axes)]
    size = rng.randint(1, 7)
    batch = (
        torch.randn(size, *sizes, dtype=torch.float64),
        torch.randint(WORDS, (size, rng.randint(1, 4))),
        torch.randint(CLASSES, (size,)),
    )
    draft.scope.update(zip(("x", "ids", "y"), (t[:1] for t in batch), strict=True))
    draft.vectors.append("x")
    for _ in range(rng.randint(2, 7)):
        _extend(draft)
    final = _finish(draft)
    if final is None:
        return None
    lines = _needed([*draft.lines, ("return", final)])
    used = {name: p.detach() for name, p in draft.params.items() if f'"{name}"' in str(lines)}
    if not any(p.numel() for p in used.values()):
        return None
    if draft.coin(0.1):
        used["unused.w"] = torch.ones(2, dtype=torch.float64)
    return Program(
        seed, lines, used, draft.constants, batch, draft.loose, draft.asks, draft.coin(0.3)
    )


def _needed(lines: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Without the lines that nothing reads."""
    kept: list[tuple[str, str]] = []
    for target, value in reversed(lines):
        names = rf"\b{target}\b"
        if not target.isidentifier() or target == "return" or re.search(names, str(kept)):
            kept.insert(0, (target, value))
    return tuple(kept)


def _undo(draft: Draft, state: tuple[Any, ...]) -> None:
    params, constants, lines, scope, vectors, weights, draft.loose, draft.asks = state
    for now, before in ((draft.params, params), (draft.constants, constants), (draft.scope, scope)):
        for name in now.keys() - before.keys():
            del now[name]
    del draft.lines[lines:], draft.vectors[vectors:], draft.weights[weights:]


def _state(d: Draft) -> tuple[Any, ...]:
    return (
        dict(d.params), dict(d.constants), len(d.lines), dict(d.scope), len(d.vectors),
        len(d.weights), d.loose, d.asks,
    )  # fmt: skip


def _extend(draft: Draft) -> None:
    """One more operation; what PyTorch itself does not accept for one sample is drawn anew."""
    while True:
        state = _state(draft)
        h = draft.vectors[-1] if draft.coin(0.8) else draft.rng.choice(draft.vectors)
        try:
            operation = draft.rng.choice(LAYERS if draft.coin(0.5) else OTHERS)
            made = draft.bind(operation(draft, h), "h")
            value = draft.scope[made]
            if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.dim() < 1:
                raise ValueError
            if value.dim() > RANK or value.shape[0] != 1 or value.dim() < 2:
                made = draft.bind(f"{made}.reshape(1, -1)", "h")
            if draft.scope[made].numel() > ELEMENTS:
                made = draft.bind(f"{made}.flatten(1)[:, :{ELEMENTS // 5}]", "h")
            if not torch.isfinite(draft.scope[made]).all():
                raise ValueError
            if draft.scope[made].numel() and draft.scope[made].abs().max() > LARGEST:
                made = draft.bind(f"({made} / 4).tanh() * 2", "h")
        except AssertionError:  # an expression of another shape than was asked for
            raise
        except Exception:  # not a program
            _undo(draft, state)
            continue
        draft.vectors.append(made)
        return


def _finish(draft: Draft) -> str | None:
    h = draft.vectors[-1]
    rows = f"{h}.flatten(1)"
    try:
        rows = draft.bind(f"F.linear({rows}, {draft.param(CLASSES, draft.shape(rows)[1])})", "r")
        final = draft.rng.choice(FINAL)
        final = final.format(
            h=h, r=rows, w=f"{draft.param(*draft.shape(h))}" if "{w}" in final else ""
        )
        if draft.coin(0.2):
            final += f" + uneven({draft.rng.choice(draft.vectors)})"
        if draft.coin(0.1):
            name = draft.rng.choice(list(draft.params))
            final += f' + 0.1 * p["{name}"].square().sum()'
        value = draft.value(final)
        if value.shape or not torch.isfinite(value) or not value.requires_grad:
            return None
        found = torch.autograd.grad(value, list(draft.params.values()), allow_unused=True)
    except Exception:  # not a program
        return None
    some = [g for g in found if g is not None]
    return final if some and all(torch.isfinite(g).all() for g in some) else None
