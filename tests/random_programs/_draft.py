"""A program while it is being written: each line is run on one sample at once, so its shapes are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGEST, ELEMENTS, RANK = 6.0, 120, 5
WORDS = 5
Operation = Callable[["Draft", str], str]


class Unfit(Exception):
    """The operation does not fit what the program holds; another one is drawn."""


def ramp(h: Tensor) -> Tensor:
    """The same values with no two equal, so that no order is a matter of chance."""
    steps = torch.linspace(0.0, 0.1, max(h.numel(), 1), dtype=h.dtype)[: h.numel()]
    return h + steps.view(h.shape)


def uneven(h: Tensor) -> Tensor:
    """A sum in which each element has its own weight: no symmetry hides an error."""
    weights = torch.linspace(0.5, 1.5, max(h.numel(), 1), dtype=h.dtype)[: h.numel()]
    return (h * weights.view(h.shape)).sum()


def filled(x: Tensor, *shape: int) -> Tensor:
    """Some values of this shape that differ from sample to sample; what reduced programs start from."""
    count = int(torch.Size(shape).numel())
    return (x.sum() + torch.arange(count, dtype=x.dtype)).sin().view(shape)


class Mapped(torch.nn.Module):
    """A linear map without initial values, which would be drawn inside the loss."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


NAMES: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint}
NAMES |= {"ramp": ramp, "uneven": uneven, "filled": filled, "Mapped": Mapped}


@dataclass
class Draft:
    """What a program holds so far.

    Attributes:
        rng: Draws everything but values of tensors, which ``torch.manual_seed`` settles.
        params: By name; the part before the dot is a group.
        constants: Frozen tensors, by name.
        lines: Target and expression, in order.
        scope: The value of each variable for one sample.
        vectors: Variables that carry activations.
        weights: Variables that hold expressions of parameters.
        loose: The program leaves float64 somewhere, so no more than a few digits agree.
        asks: The program asks for the value of a tensor.
    """

    rng: random.Random
    params: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    scope: dict[str, Any] = field(default_factory=dict)
    vectors: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    loose: bool = False
    asks: bool = False

    def value(self, expression: str) -> Any:
        names = {**NAMES, **self.scope, "p": self.params, "c": self.constants}
        return eval(expression, names)  # the program's own text

    def shape(self, expression: str) -> tuple[int, ...]:
        return tuple(self.value(expression).shape)

    def coin(self, probability: float = 0.5) -> bool:
        return self.rng.random() < probability

    def size(self) -> int:
        return self.rng.choices((1, 2, 3, 4, 5), (3, 4, 4, 3, 2))[0]

    def pick(self, *expressions: str) -> str:
        return self.rng.choice(expressions)

    def write(self, target: str, expression: str) -> str:
        """Append a line; a target with brackets or an empty one is a statement."""
        before = dict(self.scope)
        if not target:
            self.value(expression)
        elif target.isidentifier():
            self.scope[target] = self.value(expression)
        else:
            exec(
                f"{target} = {expression}",
                {**NAMES, **before, "p": self.params, "c": self.constants},
            )
        self.lines.append((target, expression))
        return target

    def bind(self, expression: str, prefix: str = "t") -> str:
        return self.write(f"{prefix}{len(self.lines)}", expression)

    # ------------------------------------------------------------------------------- operands

    def as_rank(self, h: str, rank: int) -> str:
        """The activation with ``1 + (rank - 1)`` axes."""
        have = len(self.shape(h))
        if have > rank:
            return f"{h}.flatten(1, {have - rank + 1})" if rank > 1 else f"{h}.flatten()"
        for _ in range(rank - have):
            h += f".unsqueeze({self.rng.choice((1, -1))})"
        return h

    def new(self, shape: Sequence[int]) -> str:
        name = f"{self.rng.choice('abc')}.w{len(self.params)}"
        value = torch.randn(shape, dtype=torch.float64) * 0.7
        self.params[name] = value.requires_grad_()
        return f'p["{name}"]'

    def plain(self, *shape: int) -> str:
        """A parameter of this shape as it is, perhaps one that is used already."""
        alike = [name for name, value in self.params.items() if tuple(value.shape) == shape]
        if alike and (self.coin() or len(self.params) > 9):
            return f'p["{self.rng.choice(alike)}"]'
        return self.new(shape)

    def param(self, *shape: int) -> str:
        """An expression of this shape that holds parameters."""
        if torch.Size(shape).numel() > 2 * ELEMENTS:
            raise Unfit
        alike = [w for w in self.weights if tuple(self.scope[w].shape) == shape]
        if alike and self.coin(0.4):
            return self.rng.choice(alike)
        if self.coin(0.55):
            return self.plain(*shape)
        expression = self.rng.choice(WEIGHTS)(self, shape)
        if self.shape(expression) != shape:
            raise AssertionError(f"{expression} has shape {self.shape(expression)}, not {shape}")
        if self.coin(0.4):
            self.weights.append(self.bind(expression, "w"))
            return self.weights[-1]
        return expression

    def positive(self, *shape: int) -> str:
        return f"F.softplus({self.param(*shape)})"

    def constant(self, *shape: int) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = torch.randn(shape, dtype=torch.float64) * 0.7
        return f'c["{name}"]'

    def maybe(self, *shape: int) -> str:
        """An optional operand."""
        return self.param(*shape) if self.coin(0.6) else "None"

    def partner(self, h: str) -> str:
        """Something that broadcasts with the activation: a parameter, a constant or another activation."""
        shape = self.shape(h)
        alike = [v for v in self.vectors if self.shape(v) == shape]
        if self.coin(0.3):
            return self.rng.choice(alike) if alike else h
        # From the right, some axes of size one: they broadcast.
        own = tuple(1 if self.coin(0.25) else n for n in shape)
        own = own[self.rng.randrange(len(own) + 1) :]
        return self.param(*own) if self.coin(0.8) else self.constant(*own)


# ------------------------------------------------------------------------ expressions of parameters


def _sliced(d: Draft, shape: tuple[int, ...]) -> str:
    if not shape:
        return f"{d.plain(d.size())}[0]"
    long = [
        name
        for name, value in d.params.items()
        if value.dim() == len(shape)
        and value.shape[0] > shape[0]
        and tuple(value.shape[1:]) == shape[1:]
    ]
    if long and d.coin(0.7):
        name = d.rng.choice(long)
        start = d.rng.randint(0, d.params[name].shape[0] - shape[0])
        return f'p["{name}"][{start}:{start + shape[0]}]'
    whole = d.new((shape[0] + 2, *shape[1:]))
    return f"{whole}[1:{shape[0] + 1}]" if d.coin() else f"{whole}.narrow(0, 2, {shape[0]})"


def _transposed(d: Draft, shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        return d.plain(*shape)
    swapped = d.plain(*shape[:-2], shape[-1], shape[-2])
    return f"{swapped}.mT" if d.coin() else f"{swapped}.transpose(-1, -2).contiguous()"


def _product(d: Draft, shape: tuple[int, ...]) -> str:
    if len(shape) != 2:
        return f"({d.plain(*shape)} * {d.plain(*shape)})"
    inner = d.size()
    left, right = d.plain(shape[0], inner), d.plain(inner, shape[1])
    return d.pick(f"({left} @ {right})", f"torch.einsum('ij,jk->ik', {left}, {right})")


def _function(d: Draft, shape: tuple[int, ...]) -> str:
    w = d.plain(*shape)
    return d.pick(
        f"{w}.tanh()",
        f"({w} / (1 + {w}.square().sum()))",
        f"({w} + {d.constant(*shape)})",
        f"({w} - {w}.mean())",
        f"({d.plain()} * {w})",
        f"F.normalize({w}, dim=0)" if shape else f"{w}.exp()",
        f"{w}.softmax(-1)" if shape else f"{w}.sin()",
        f"F.dropout({w}, 0.5, training=False)",
        f"{w}.detach()",
        f"{w}.clone()",
        f"torch.where({w} > 0, {w}, 0.1 * {w})",
        f"{w}.mul(2)",
    )


def _reshaped(d: Draft, shape: tuple[int, ...]) -> str:
    count = torch.Size(shape).numel()
    return f"{d.plain(count)}.view({', '.join(map(str, shape))})" if shape else d.plain(1) + "[0]"


def _joined(d: Draft, shape: tuple[int, ...]) -> str:
    if not shape or shape[0] < 2:
        return d.plain(*shape)
    if d.coin():
        rows = ", ".join(d.plain(*shape[1:]) for _ in range(shape[0]))
        return f"torch.stack([{rows}])"
    return f"torch.cat([{d.plain(1, *shape[1:])}, {d.plain(shape[0] - 1, *shape[1:])}])"


def _chunk(d: Draft, shape: tuple[int, ...]) -> str:
    if not shape or not shape[0]:
        return d.plain(*shape)
    packed = d.plain(3 * shape[0], *shape[1:])
    part = d.rng.randrange(3)
    return d.pick(f"{packed}.chunk(3)[{part}]", f"{packed}.split({shape[0]})[{part}]")


def _expanded(d: Draft, shape: tuple[int, ...]) -> str:
    narrow = tuple(1 if d.coin() else n for n in shape)
    return f"{d.plain(*narrow)}.expand({', '.join(map(str, shape))})" if shape else d.plain()


def _indexed(d: Draft, shape: tuple[int, ...]) -> str:
    if not shape or not shape[0]:
        return d.plain(*shape)
    rows = [d.rng.randrange(shape[0] + 1) for _ in range(shape[0])]
    w = d.plain(shape[0] + 1, *shape[1:])
    return d.pick(f"{w}[{rows}]", f"{w}.index_select(0, torch.tensor({rows}))")


def _fast(d: Draft, shape: tuple[int, ...]) -> str:
    """A weight that depends on the sample."""
    h = d.rng.choice(d.vectors)
    w = d.plain(*shape)
    return d.pick(f"({w} * {h}.sum().tanh())", f"({w} + uneven({h}).sin())")


def _looked_up(d: Draft, shape: tuple[int, ...]) -> str:
    """Rows that the sample's own words choose."""
    if not shape or "ids" not in d.scope or d.scope["ids"].shape[1] < shape[0]:
        return d.plain(*shape)
    return f"{d.plain(WORDS, *shape[1:])}[ids[0, :{shape[0]}]]"


WEIGHTS = (
    _sliced, _sliced, _transposed, _product, _function, _function, _reshaped, _joined, _chunk,
    _expanded, _indexed, _fast, _looked_up,
)  # fmt: skip
