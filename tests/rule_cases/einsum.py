"""Equations of every layout, between data and a weight."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
SIZES = {letter: 2 + index % 3 for index, letter in enumerate(string.ascii_letters)}


def draw(letters: str) -> Tensor:
    return torch.randn([SIZES[letter] for letter in letters], dtype=torch.float64)


def _square(output: Tensor) -> Tensor:
    return (output.sin() + output).square().sum()


def _case(name: str, equation: str, data: str, weight: str) -> RuleCase:
    """``data`` are the letters that one sample has behind the batch of one."""
    data_first = equation.index(weight) > 0

    def loss(p: Params, x: Tensor) -> Tensor:
        operands = (x, p["weight"]) if data_first else (p["weight"], x)
        return _square(torch.einsum(equation, *operands))

    return RuleCase("einsum", name, loss, lambda: {"weight": draw(weight)}, _batch(data))


def _batch(letters: str) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda size: (torch.stack([draw(letters) for _ in range(size)]),)


def _two_layouts(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """One weight whose axes are grouped into rows and columns in two ways."""
    first = torch.einsum("nthd,hdm->ntm", x, p["weight"])
    return _square(first) + _square(torch.einsum("nth,hdm->ntdm", y, p["weight"]))


def _with_linear(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return _square(torch.einsum("nti,oi->nto", x, p["weight"])) + _square(F.linear(y, p["weight"]))


CASES: list[RuleCase] = [
    _case("linear", "nti,oi->nto", "ti", "oi"),
    _case("matmul", "nti,io->nto", "ti", "io"),
    _case("weight_first", "oi,nti->nto", "ti", "oi"),
    _case("one_position", "ni,oi->no", "i", "oi"),
    _case("ellipsis", "...i,oi->...o", "tui", "oi"),
    RuleCase("einsum", "ellipsis_moved",
             lambda p, x: _square(torch.einsum("i...,oi->o...", x[0], p["weight"])),
             lambda: {"weight": draw("oi")}, _batch("itu")),
    _case("implicit_output", "nti,io", "ti", "io"),
    _case("implicit_ellipsis", "...i,io", "ti", "io"),
    _case("positions_last", "nit,oi->not", "it", "oi"),
    _case("positions_permuted", "ntui,oi->nuot", "tui", "oi"),
    _case("heads_out", "ntm,mhd->nhtd", "tm", "mhd"),
    _case("heads_out_rows_first", "ntm,hdm->nthd", "tm", "hdm"),
    _case("heads_out_interleaved", "ntm,hmd->nthd", "tm", "hmd"),
    _case("heads_in", "nthd,hdm->ntm", "thd", "hdm"),
    _case("heads_in_reordered", "nthd,dhm->ntm", "thd", "dhm"),
    _case("a_weight_per_head", "nthd,hde->nthe", "thd", "hde"),
    _case("a_weight_per_head_rows_first", "nhtd,hed->nthe", "htd", "hed"),
    _case("a_weight_per_head_last", "nthd,deh->nthe", "thd", "deh"),
    _case("data_summed_first", "nti,oi->no", "ti", "oi"),
    _case("diagonal_of_data", "ntii,oi->nto", "tii", "oi"),
    _case("diagonal_of_data_kept", "nii,io->nio", "ii", "io"),
    _case("vector", "nti,i->nt", "ti", "i"),
    _case("outer_with_vector", "nt,d->ntd", "t", "d"),
    _case("scaled", "ntd,d->ntd", "td", "d"),
    _case("contracted_to_scalar", "noi,oi->n", "oi", "oi"),
    _case("batch_axis_summed", "nti,oi->to", "ti", "oi"),
    RuleCase("einsum", "two_layouts_of_one_weight", _two_layouts, lambda: {"weight": draw("hdm")},
             lambda size: (*_batch("thd")(size), *_batch("th")(size))),
    RuleCase("einsum", "with_linear", _with_linear, lambda: {"weight": draw("oi")},
             lambda size: (*_batch("ti")(size), *_batch("ui")(size))),
    RuleCase("einsum", "list_of_operands",
             lambda p, x: _square(torch.einsum("ni,io->no", [x, p["weight"]])),
             lambda: {"weight": draw("io")}, _batch("i")),
    RuleCase("einsum", "sublists",
             lambda p, x: _square(torch.einsum(x, [0, 1], p["weight"], [1, 2], [0, 2])),
             lambda: {"weight": draw("io")}, _batch("i")),
]  # fmt: skip

# Left to the exact fallback.
DECLINED = [
    _case("diagonal_of_weight", "ni,ii->ni", "i", "ii"),
    _case("weight_axis_summed_away", "ni,io->ni", "i", "io"),
    RuleCase("einsum", "broadcast_axis", lambda p, x: _square(
        torch.einsum("ntk,ok->nto", x[..., :1], p["weight"])), lambda: {"weight": draw("ok")},
        _batch("tk")),
    RuleCase("einsum", "three_operands", lambda p, x: _square(
        torch.einsum("ni,io,ou->nu", x, p["weight"], p["other"])),
        lambda: {"weight": draw("io"), "other": draw("ou")}, _batch("i")),
    RuleCase("einsum", "two_weights", lambda p, x: _square(
        x @ torch.einsum("ir,ro->io", p["a"], p["b"])),
        lambda: {"a": draw("ir"), "b": draw("ro")}, _batch("i")),
]  # fmt: skip

CASES += [replace(case, declines=True) for case in DECLINED]
