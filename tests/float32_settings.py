"""Every way to let PyTorch compute float32 products in fewer digits, and what a process has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter
_PARENTS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]
_OPERATIONS = [(kind, each) for kind in ("cuda", "mkldnn") for each in ("matmul", "conv", "rnn")]


def _everywhere(value: str) -> None:
    _set("generic", "all", value)


def _everywhere_and_products() -> None:
    """The products' own setting is what they would inherit."""
    _everywhere("bf16")
    _set("mkldnn", "matmul", "bf16")


# By name: of the older family, and of the newer one, after which reads of the older ones raise.
SETTINGS: dict[str, Callable[[], object]] = {
    "default": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "mkldnn bf16": lambda: _set("mkldnn", "matmul", "bf16"),
    "backends bf16": lambda: _everywhere("bf16"),
    "backends tf32": lambda: _everywhere("tf32"),
    "all of mkldnn bf16": lambda: _set("mkldnn", "all", "bf16"),
    "convolutions bf16": lambda: _set("mkldnn", "conv", "bf16"),
    "cuda tf32": lambda: _set("cuda", "matmul", "tf32"),
    "cudnn ieee": lambda: _set("cuda", "conv", "ieee"),
    "explicit and inherited": _everywhere_and_products,
    "ieee": lambda: _everywhere("ieee"),
}


def own_settings() -> dict[tuple[str, str], str]:
    """What each setting holds itself, where a read returns what it inherits."""
    found = {}
    for parent in _PARENTS:
        found[parent] = _get(*parent)
        _set(*parent, "none")
    found |= {operation: _get(*operation) for operation in _OPERATIONS}
    for parent in _PARENTS:
        _set(*parent, found[parent])
    return found


def all_reads() -> dict[str, object]:
    """What a process can read, by both families; those of the older one may raise."""
    found: dict[str, object] = {str(each): _get(*each) for each in _PARENTS + _OPERATIONS}
    for name, read in {
        "products": torch.get_float32_matmul_precision,
        "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
    }.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "raises"
    return found


PYTORCHS_OWN = own_settings()  # when tests are collected, so none has changed a setting yet


@contextmanager
def setting(name: str) -> Iterator[None]:
    """Make a setting in a process that has made no other, and put the former ones back."""
    before = own_settings()
    _put_back(PYTORCHS_OWN)
    SETTINGS[name]()
    try:
        yield
    finally:
        _put_back(before)


def _put_back(settings: dict[tuple[str, str], str]) -> None:
    torch.set_float32_matmul_precision("highest")
    for each, value in settings.items():
        _set(*each, value)


def computes_in_bfloat16() -> bool:
    """Whether this CPU takes bfloat16 for float32 products where it may."""
    a = torch.randn(8, 128, 128, generator=torch.Generator().manual_seed(0))
    with setting("medium"):
        error = torch.bmm(a, a).double() - torch.bmm(a.double(), a.double())
    return bool(error.abs().max() > 1e-3)
