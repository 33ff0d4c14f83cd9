"""Imports inside clipgrad point one way, and randomness has one home."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "clipgrad"
EVERYTHING = {path.stem for path in PACKAGE.iterdir()}

# profile -> optimizer -> transform -> _plan -> rules -> _canonical. A name stands for all that lies below it.
INSIDE = {
    "rules",
    "_lanes",
    "_shared",
    "_tape",
    "_capture",
    "_call",
    "_branches",
    "_plan",
    "_gradients",
    "_piece",
    "_microbatch",
}
MACHINERY = INSIDE | {"transform"}
ABOVE = {"optimizer", "transform", "_microbatch", "compiled"}
FORBIDDEN = {
    "profile": INSIDE | {"transform"},
    "optimizer": INSIDE,
    "transform": {"optimizer"},
    "compiled": {"optimizer", "transform"},
    "compiled._observe": MACHINERY | {"optimizer"},
    "compiled._state": MACHINERY | {"optimizer"},
    "compiled._walk": MACHINERY | {"optimizer"},
    "compiled._backend": MACHINERY | {"optimizer"},
    "_microbatch": {"optimizer", "transform", "compiled"},
    "_plan": ABOVE,
    "_capture": ABOVE,
    "_gradients": ABOVE,
    "_tape": ABOVE | {"_plan", "_capture", "_gradients"},
    "rules": ABOVE | {"_plan", "_capture", "_gradients", "_tape"},
    "rules._canonical": MACHINERY | {"optimizer"},
    "clipping": MACHINERY,
    "noise": MACHINERY,
    "sampling": MACHINERY,
    "accounting": MACHINERY | {"torch"},
    "_phases": EVERYTHING | {"clipgrad", "torch"},
    # An audit shares no code with what it audits: the public names are all that it may use.
    "audit": INSIDE | {name for name in EVERYTHING if name.startswith("_") and name != "__init__"},
}
# The only modules that draw random numbers; audit._coins decides which canaries are trained on.
RANDOM = {"noise", "sampling", "testing", "audit._coins"}
RANDOM_CALL = re.compile(
    r"(rand|randn|randint)(_like)?|randperm|(normal|bernoulli|poisson)_?|(random|uniform)_"
    r"|multinomial|exponential_|manual_seed|Generator|default_rng|SystemRandom|urandom|token_bytes"
)


def below(name: str, roots: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, also of those in functions or under TYPE_CHECKING."""
    folders = ["clipgrad", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) + 1 - node.level] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What `source`, the file at `path` inside the package, does against the rules."""
    tree, found = ast.parse(source), []
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    forbidden = {name for layer in FORBIDDEN if below(module, {layer}) for name in FORBIDDEN[layer]}
    forbidden |= set() if module == "testing" else {"_reference"}
    for last in ("profile", "audit"):  # nothing but the package itself imports them
        forbidden |= set() if below(module, {"__init__", last}) else {last}
    for line, name in imports(path, tree):
        if below(name.removeprefix("clipgrad."), forbidden):
            found.append(f"clipgrad/{path}:{line} imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and module not in RANDOM:
            called = ast.unparse(node.func).rpartition(".")[2]
            if RANDOM_CALL.fullmatch(called):
                found.append(f"clipgrad/{path}:{node.lineno} draws randomness: {called}")
    return found


def test_package_keeps_its_layers() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert not [
        v for f in files for v in violations(f.relative_to(PACKAGE).as_posix(), f.read_text())
    ]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("transform.py", "from clipgrad.optimizer import DPOptimizer"),
        ("_plan.py", "from . import transform"),
        ("rules/linear.py", "from .._plan import Plan"),
        ("rules/linear.py", "from .. import _plan"),
        ("rules/__init__.py", "import clipgrad.transform as t"),
        ("rules/_canonical.py", "from . import linear"),
        ("rules/_canonical.py", "from ._registry import Rule"),
        ("optimizer.py", "from clipgrad import rules"),
        ("clipping.py", "def f():\n    from .rules import linear"),
        ("noise.py", "if TYPE_CHECKING:\n    from clipgrad._capture import Tape"),
        ("sampling.py", "from clipgrad.transform import clipped_grad"),
        ("accounting.py", "from torch import Tensor"),
        ("accounting.py", "import torch.distributed"),
        ("transform.py", "from clipgrad._reference import clipped_sum"),
        ("optimizer.py", "from clipgrad.profile import profile_step"),
        ("profile/__main__.py", "from clipgrad._microbatch import run"),
        ("_phases.py", "from clipgrad import errors"),
        ("_phases.py", "import clipgrad"),
        ("_phases.py", "import torch"),
        ("profile/__main__.py", "x = torch.randn(3)"),
        ("compiled/_step.py", "from clipgrad import _reference"),
        ("compiled/_step.py", "from clipgrad.transform import ClippedGrad"),
        ("compiled/_state.py", "from clipgrad._microbatch import run"),
        ("_microbatch.py", "from clipgrad.compiled import Compiler"),
        ("optimizer.py", "from clipgrad import audit"),
        ("audit/_recorder.py", "from clipgrad._pending import Pending"),
        ("audit/_recorder.py", "from clipgrad._gradients import Gradients"),
        ("audit/_bound.py", "import secrets\nsecrets.token_bytes(3)"),
        ("transform.py", "x = torch.randn(3)"),
        ("optimizer.py", "g.add_(torch.empty_like(g).normal_())"),
        ("rules/linear.py", "g = torch.Generator()"),
        ("_plan.py", "from torch import bernoulli\nbernoulli(p)"),
    ],
)
def test_forbidden_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from .transform import clipped_grad"),
        ("optimizer.py", "from clipgrad.transform import ClippedGrad"),
        ("transform.py", "from . import _plan, clipping\nfrom .rules import registry"),
        ("_plan.py", "from clipgrad.rules._registry import Rule"),
        ("compiled/_graph.py", "from clipgrad._microbatch import run"),
        ("transform.py", "from clipgrad.compiled import Compiler"),
        ("rules/linear.py", "from ._canonical import norm\nfrom clipgrad.rules import _registry"),
        ("rules/_canonical.py", "import torch\nfrom .._validate import check"),
        ("testing.py", "from clipgrad._reference import clipped_sum"),
        ("noise.py", "import torch\ntorch.Generator()\ntorch.empty(3).normal_()"),
        ("sampling.py", "torch.rand(3)"),
        ("transform.py", "def f(generator: torch.Generator): vmap(f, randomness='different')"),
        ("accounting.py", "import torchless"),
        ("rules/linear.py", "from clipgrad._phases import phase"),
        ("profile/__init__.py", "from clipgrad.profile._measure import profile_step"),
        ("profile/_measure.py", "from clipgrad.optimizer import DPOptimizer"),
        ("_phases.py", "from typing import Protocol"),
        ("__init__.py", "from clipgrad import accounting, audit"),
        ("audit/_recorder.py", "from clipgrad.optimizer import DPOptimizer"),
        ("audit/__init__.py", "from clipgrad.audit._coins import Canaries"),
        ("audit/_coins.py", "import secrets\nsecrets.token_bytes(3)"),
    ],
)
def test_allowed_is_left_alone(path: str, source: str) -> None:
    assert not violations(path, source)
