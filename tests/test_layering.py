"""Imports inside clipgrad point one way, and randomness has one home."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "clipgrad"
EVERYTHING = {path.stem for path in PACKAGE.iterdir()}

# profile -> optimizer -> transform -> _plan -> rules -> _canonical -> _selection. A name stands for all below it.
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
# What noise is made of; it ends in _system, by way of _accelerator and _cpu.
NOISE = {
    "noise._system",
    "noise._seeded",
    "noise._accelerator",
    "noise._cpu",
    "noise._c_loop",
    "noise._box_muller",
    "noise._keystream",
    "noise._keys",
}
# rules._ghost -> rules._gram -> rules._gram_triton -> rules._gram_kernels
GHOST = {"rules._ghost", "rules._gram"}
RULES = {f"rules.{path.stem}" for path in (PACKAGE / "rules").iterdir()}
ABOVE = {"optimizer", "transform", "_microbatch", "compiled"}
# _make -> _loader -> _users -> _poisson -> _trials -> _words
SAMPLERS = {"sampling._poisson", "sampling._users", "sampling._loader", "sampling._make"}
FORBIDDEN = {
    "profile": INSIDE | {"transform"},
    "optimizer": INSIDE,
    "transform": {"optimizer"},
    "compiled": {"optimizer", "transform"},
    "compiled._observe": MACHINERY | {"optimizer"},
    "compiled._state": MACHINERY | {"optimizer"},
    "compiled._walk": MACHINERY | {"optimizer"},
    "compiled._elsewhere": MACHINERY | {"optimizer", "compiled._walk"},
    "compiled._objects": MACHINERY | {"optimizer", "compiled._walk", "compiled._elsewhere"},
    "compiled._places": MACHINERY
    | {"optimizer", "compiled._walk", "compiled._elsewhere", "compiled._objects"},
    "compiled._backend": MACHINERY | {"optimizer"},
    "_microbatch": {"optimizer", "transform", "compiled"},
    "_plan": ABOVE,
    "_capture": ABOVE,
    "_gradients": ABOVE,
    "_tape": ABOVE | {"_plan", "_capture", "_gradients"},
    "rules": ABOVE | {"_plan", "_capture", "_gradients", "_tape"},
    "rules._canonical": MACHINERY - {"rules"} | {"optimizer"} | RULES - {"rules._selection"},
    "rules._ghost": MACHINERY - {"rules"} | {"rules._registry"},
    "rules._gram": GHOST - {"rules._gram"} | {"rules._canonical"},
    "rules._gram_triton": GHOST | {"rules._canonical"},
    "rules._gram_kernels": EVERYTHING | {"clipgrad", "torch"},
    "rules._selection": RULES - {"rules._selection_triton"},
    "rules._selection_triton": RULES - {"rules._selection_kernels"},
    "rules._selection_kernels": EVERYTHING | {"clipgrad", "torch"},
    "clipping": MACHINERY | {"optimizer", "compiled"},
    "plan": MACHINERY | {"optimizer", "compiled", "noise", "sampling", "_account", "_mechanism"},
    "_account": MACHINERY | {"optimizer", "compiled", "noise", "sampling"},
    "_mechanism": MACHINERY | {"optimizer", "compiled", "sampling", "_account"},
    "checkpoint": MACHINERY | {"optimizer", "plan", "noise", "sampling"},
    "noise": MACHINERY | {"optimizer"},
    "noise._checks": NOISE,
    "noise._pieces": NOISE,
    "noise._keys": NOISE,
    "noise._keystream": NOISE,
    "noise._chacha_kernels": NOISE | {"torch", "noise._checks"},
    "noise._box_muller_kernels": NOISE | {"torch", "noise._checks", "noise._chacha_kernels"},
    "noise._chacha_proof": NOISE | {"noise._chacha_triton", "noise._chacha_kernels"},
    "noise._box_muller": NOISE - {"noise._box_muller", "noise._keystream"},
    "noise._c_loop": NOISE - {"noise._c_loop", "noise._box_muller", "noise._keystream"},
    "noise._cpu": {"noise._system", "noise._accelerator", "noise._seeded"},
    "noise._accelerator": {"noise._system", "noise._seeded"},
    "noise._system": {"noise._seeded", "noise._mean"},
    "noise._mean": {"noise._seeded"},
    "discrete": MACHINERY,
    "_discrete_gaussian": EVERYTHING | {"clipgrad", "torch"},
    "_grid": MACHINERY | {"optimizer", "compiled", "noise", "discrete"},
    "sampling": MACHINERY | {"optimizer"},
    "sampling._words": {"sampling._trials", *SAMPLERS},
    "sampling._trials": SAMPLERS,
    "sampling._collate": SAMPLERS,
    "sampling._poisson": SAMPLERS - {"sampling._poisson"},
    "sampling._users": {"sampling._loader", "sampling._make"},
    "sampling._loader": {"sampling._make"},
    "accounting": (EVERYTHING - {"accounting"}) | {"clipgrad", "torch"},
    "_phases": EVERYTHING | {"clipgrad", "torch"},
    # An audit shares no code with what it audits: the public names are all that it may use.
    "audit": INSIDE | {name for name in EVERYTHING if name.startswith("_") and name != "__init__"},
}
# Where a random number may be drawn. In noise that is where keys are made; what makes Gaussians of them is a function.
# audit._coins decides which canaries are trained on.
HOMES = {
    "noise._keys",
    "noise._seeded",
    "discrete",
    "_discrete_gaussian",
    "sampling",
    "audit._coins",
    "testing",
}
RANDOM_CALL = re.compile(
    r"(rand|randn|randint)(_like)?|randperm|(normal|bernoulli|poisson)_?|(random|uniform)_"
    r"|multinomial|exponential_|manual_seed|Generator|default_rng|SystemRandom|urandom|token_bytes"
    r"|randbelow|discrete_gaussian"
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
        if isinstance(node, ast.Call) and not below(module, HOMES):
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
        ("clipping/_rules.py", "from clipgrad._piece import Piece"),
        ("clipping/_progress.py", "from clipgrad.optimizer import DPOptimizer"),
        ("clipping/_adaptive.py", "noise = torch.randn(())"),
        ("plan.py", "from clipgrad.optimizer import DPOptimizer"),
        ("_account.py", "from clipgrad.noise import SystemNoise"),
        ("noise.py", "if TYPE_CHECKING:\n    from clipgrad._capture import Tape"),
        ("sampling/_loader.py", "from clipgrad.transform import clipped_grad"),
        ("sampling/_trials.py", "from clipgrad.sampling._poisson import PoissonSampler"),
        ("sampling/_users.py", "from clipgrad.sampling._loader import PrivateLoader"),
        ("sampling_more.py", "x = torch.randn(3)"),
        ("accounting/__init__.py", "from torch import Tensor"),
        ("accounting/_ledger.py", "import torch.distributed"),
        ("accounting/_sampling.py", "from ..clipping import Relation"),
        ("accounting/_pld.py", "import clipgrad"),
        ("noise/_cpu.py", "if TYPE_CHECKING:\n    from clipgrad._capture import Tape"),
        ("noise/_cpu.py", "from clipgrad.noise._system import SystemNoise"),
        ("noise/_cpu.py", "x.normal_()"),
        ("noise/_box_muller.py", "from clipgrad.noise import _keys"),
        ("noise/_box_muller.py", "from clipgrad.noise._c_loop import looped"),
        ("noise/_c_loop.py", "from clipgrad.noise._keys import Lineage"),
        ("noise/_keys.py", "from clipgrad.noise._keystream import Keystream"),
        ("noise/_accelerator.py", "torch.randn(3, device='cuda')"),
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
        ("_grid.py", "from clipgrad.discrete import DiscreteGaussianNoise"),
        ("_grid.py", "from clipgrad._piece import Piece"),
        ("discrete.py", "from clipgrad.transform import ClippedGrad"),
        ("_grid.py", "secrets.randbelow(2)"),
        ("_discrete_gaussian.py", "from clipgrad.discrete import DiscreteGaussianNoise"),
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
        ("sampling/_words.py", "torch.rand(3)\nsecrets.token_bytes(8)"),
        ("sampling/_users.py", "from clipgrad.sampling._poisson import PoissonSampler"),
        ("noise/_seeded.py", "import torch\ntorch.Generator()\ntorch.empty(3).normal_()"),
        ("noise/_keys.py", "secrets.token_bytes(32)"),
        ("noise/_cpu.py", "from clipgrad.noise._keys import Lineage"),
        ("transform.py", "def f(generator: torch.Generator): vmap(f, randomness='different')"),
        ("accounting/_run.py", "import torchless"),
        ("accounting/_run.py", "from . import _checks\nfrom ._sampling import Poisson"),
        ("accounting/_run.py", "from clipgrad.accounting._checks import rate"),
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
