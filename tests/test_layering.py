"""Imports inside clipgrad point one way, and randomness has one home."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "clipgrad"

# Each room, from the ground up, and the rooms that it may import from. `__init__` may import from all.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "_phases": set(),
    "_tracebacks": {"errors"},
    "_validate": set(),
    "_functorch": set(),
    "accounting": set(),
    "batch_norm": {"errors"},
    "checkpoint": set(),
    "factorisation": set(),
    "kernels": set(),
    "loss_graph": {"errors", "kernels"},
    "result": set(),
    "rules": {"_functorch", "batch_norm", "errors", "kernels"},
    "noise": {"errors", "factorisation", "kernels"},
    "clipping": {"_validate", "result"},
    "options": {"_validate"},
    "ranks": set(),
    "distributed": {"errors", "ranks"},
    "arithmetic": {"clipping", "noise", "options"},
    "exact": {"_validate", "clipping", "noise", "options"},
    "plan": {"_validate", "accounting", "clipping", "errors", "factorisation", "ranks"},
    "sampling": {"accounting", "plan", "ranks"},
    "engine": {
        "_functorch", "_phases", "_validate", "arithmetic", "clipping", "errors", "kernels", "loss_graph", "options",
        "ranks", "rules",
    },
    "compiled": {"clipping", "engine", "errors", "kernels", "loss_graph", "rules"},
    "explain": {"engine", "ranks"},
    "empty_batch": {"engine", "errors", "result"},
    "batch": {
        "_validate", "arithmetic", "clipping", "compiled", "empty_batch", "engine", "errors", "exact", "explain",
        "loss_graph", "options", "ranks", "result",
    },
    "function": {"_tracebacks", "batch", "clipping", "engine", "explain", "options", "result"},
    "optimizer": {
        "_functorch", "_phases", "_tracebacks", "_validate", "accounting", "arithmetic", "batch", "batch_norm",
        "clipping", "compiled", "distributed", "engine", "errors", "exact", "explain", "noise", "options", "plan",
        "ranks", "result", "sampling",
    },
    "attached_loop": {"errors", "noise", "optimizer", "options", "plan"},
    "profile": {"_phases", "optimizer"},
    "audit": {"clipping", "optimizer"},
    "testing": {"engine", "function", "options", "result", "rules"},
    "integrations": {
        "accounting", "errors", "noise", "optimizer", "options", "plan", "result", "sampling",
    },
}  # fmt: skip
# An audit shares no code with what it audits: of the rooms below it, it may use what they export.
EXPORTED = {"optimizer": {"DPOptimizer"}, "clipping": {"Relation"}}

# What noise is made of; it ends in system, by way of accelerator and cpu.
NOISE = {
    "noise.system", "noise.seeded", "noise.accelerator", "noise.cpu", "noise.c_loop", "noise.box_muller",
    "noise.keystream", "noise.keys",
}  # fmt: skip
RULES = {f"rules.{path.stem}" for path in (PACKAGE / "rules").iterdir()}
LOADERS = {"sampling._make", "sampling._user_loader"}
SAMPLERS = {"sampling._poisson", "sampling._users", "sampling._loader", *LOADERS}
# Inside of a room. A name stands for all below it.
FORBIDDEN: dict[str, set[str]] = {
    "rules.one_hot": RULES,
    "rules.operands": RULES,
    "rules.canonical": RULES - {"rules.one_hot", "rules.operands"},
    "rules.row_norms": RULES - {"rules.operands"},
    "rules.ghost": RULES
    - {"rules.canonical", "rules.gram", "rules.one_hot", "rules.operands", "rules.row_norms"},
    "rules.gram": RULES,
    "kernels.gram_kernels": {"torch"},
    "kernels.selection_kernels": {"torch"},
    "kernels.weighted_sum_kernels": {"torch"},
    "kernels.chacha_kernels": {"torch"},
    "kernels.box_muller_kernels": {"torch"},
    "noise.checks": NOISE,
    "noise.pieces": NOISE,
    "noise.keys": NOISE,
    "noise.keystream": NOISE,
    "noise.box_muller": NOISE - {"noise.box_muller", "noise.keystream"},
    "noise.c_loop": NOISE - {"noise.c_loop", "noise.box_muller", "noise.keystream"},
    "noise.cpu": {"noise.system", "noise.accelerator", "noise.seeded"},
    "noise.accelerator": {"noise.system", "noise.seeded"},
    "noise.system": {"noise.seeded", "noise.step_noise"},
    "noise.step_noise": {"noise.seeded"},
    "sampling._words": {"sampling._trials", *SAMPLERS},
    "sampling._trials": SAMPLERS,
    "sampling._collate": SAMPLERS,
    "sampling._poisson": SAMPLERS - {"sampling._poisson"},
    "sampling._users": {"sampling._loader", *LOADERS},
    "sampling._loader": LOADERS,
    "exact.grid": {"exact.noise", "exact.sampler"},
    "exact.sampler": {"torch", "exact.noise", "exact.grid"},
    "accounting": {"torch"},
    "factorisation": {"torch"},
    "_phases": {"torch"},
}
# Where a random number may be drawn. In noise that is where keys are made; what makes Gaussians of them is a function.
# audit._coins decides which canaries are trained on, plan.run names a run.
HOMES = {
    "noise.keys",
    "noise.seeded",
    "exact.noise",
    "exact.sampler",
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


def leaves_its_room(module: str, name: str) -> bool:
    """Whether a module of the package may not import a name, for the rooms that the two are in."""
    room, _, _ = module.partition(".")
    if room == "__init__" or not f"{name}.".startswith("clipgrad."):
        return False
    target, _, rest = name.removeprefix("clipgrad").removeprefix(".").partition(".")
    if below(name, {"clipgrad.engine.reference"}) and room != "testing":
        return module != "engine.reference"
    if target == room:
        return False
    if room == "audit":
        return target not in EXPORTED or rest not in EXPORTED[target]
    return target not in ROOMS.get(room, set())


def violations(path: str, source: str) -> list[str]:
    """What `source`, the file at `path` inside the package, does against the rules."""
    tree, found = ast.parse(source), []
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    forbidden = {name for layer in FORBIDDEN if below(module, {layer}) for name in FORBIDDEN[layer]}
    for line, name in imports(path, tree):
        inside = below(name.removeprefix("clipgrad."), forbidden)
        if inside or leaves_its_room(module, name):
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


def test_every_room_has_its_place_and_rooms_have_no_circle() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__init__", "__pycache__"} == ROOMS.keys()
    seen: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= seen, f"{room} imports from rooms above it"
        seen.add(room)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("function.py", "from clipgrad.optimizer import DPOptimizer"),
        ("engine/norm_method.py", "from .. import function"),
        ("rules/linear.py", "from ..engine.norm_method import Choice"),
        ("rules/linear.py", "from clipgrad import engine"),
        ("rules/__init__.py", "import clipgrad.function as t"),
        ("rules/canonical.py", "from . import linear"),
        ("rules/canonical.py", "from .registry import Rule"),
        ("optimizer/dp_optimizer.py", "from clipgrad import rules"),
        ("clipping/_groups.py", "def f():\n    from ..rules import linear"),
        ("clipping/_groups.py", "from clipgrad.engine.clip_and_sum import MicrobatchResult"),
        ("clipping/_schedule.py", "from clipgrad.optimizer import DPOptimizer"),
        ("clipping/_adaptive.py", "noise = torch.randn(())"),
        ("plan/privacy_plan.py", "from clipgrad.optimizer import DPOptimizer"),
        ("plan/account.py", "from clipgrad.noise import SystemNoise"),
        ("noise/system.py", "if TYPE_CHECKING:\n    from clipgrad.engine.capture import Tape"),
        ("sampling/_loader.py", "from clipgrad.function import clipped_grad"),
        ("sampling/_trials.py", "from clipgrad.sampling._poisson import PoissonSampler"),
        ("sampling/_users.py", "from clipgrad.sampling._loader import PrivateLoader"),
        ("result.py", "x = torch.randn(3)"),
        ("accounting/__init__.py", "from torch import Tensor"),
        ("factorisation/banded.py", "import torch"),
        ("accounting/_ledger.py", "import torch.distributed"),
        ("accounting/_sampling.py", "from ..clipping import Relation"),
        ("accounting/_pld.py", "import clipgrad"),
        ("kernels/chacha_kernels.py", "import torch"),
        ("kernels/selection.py", "from clipgrad.rules import linear"),
        ("noise/cpu.py", "from clipgrad.noise.system import SystemNoise"),
        ("noise/cpu.py", "x.normal_()"),
        ("noise/box_muller.py", "from clipgrad.noise import keys"),
        ("noise/box_muller.py", "from clipgrad.noise.c_loop import looped"),
        ("noise/c_loop.py", "from clipgrad.noise.keys import KeyDeriver"),
        ("noise/keys.py", "from clipgrad.noise.keystream import Keystream"),
        ("noise/accelerator.py", "torch.randn(3, device='cuda')"),
        ("function.py", "from clipgrad.engine.reference import clipped_sum"),
        ("engine/tape.py", "from clipgrad.engine import reference"),
        ("optimizer/dp_optimizer.py", "from clipgrad.profile import profile_step"),
        ("profile/__main__.py", "from clipgrad.engine.microbatch import run"),
        ("_phases.py", "from clipgrad import errors"),
        ("_phases.py", "import clipgrad"),
        ("_phases.py", "import torch"),
        ("profile/__main__.py", "x = torch.randn(3)"),
        ("compiled/compiler.py", "from clipgrad.engine import reference"),
        ("compiled/compiler.py", "from clipgrad.function import ClippedGrad"),
        ("loss_graph/graph.py", "from clipgrad.engine.capture import Capture"),
        ("engine/microbatch.py", "from clipgrad.compiled import Compiler"),
        ("optimizer/dp_optimizer.py", "from clipgrad import audit"),
        ("audit/_recorder.py", "from clipgrad.optimizer.pending import Pending"),
        ("audit/_recorder.py", "from clipgrad.engine.gradients import Gradients"),
        ("audit/_bound.py", "import secrets\nsecrets.token_bytes(3)"),
        ("function.py", "x = torch.randn(3)"),
        ("optimizer/dp_optimizer.py", "g.add_(torch.empty_like(g).normal_())"),
        ("rules/linear.py", "g = torch.Generator()"),
        ("engine/norm_method.py", "from torch import bernoulli\nbernoulli(p)"),
        ("exact/grid.py", "from clipgrad.exact.noise import DiscreteGaussianNoise"),
        ("exact/grid.py", "from clipgrad.engine.clip_and_sum import MicrobatchResult"),
        ("exact/noise.py", "from clipgrad.function import ClippedGrad"),
        ("exact/grid.py", "secrets.randbelow(2)"),
        ("exact/sampler.py", "from clipgrad.exact.noise import DiscreteGaussianNoise"),
        ("new_room.py", "from clipgrad import errors"),
    ],
)
def test_forbidden_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from .function import clipped_grad"),
        ("optimizer/dp_optimizer.py", "from clipgrad.batch import BatchClipper"),
        ("function.py", "from . import clipping\nfrom .engine import clip_and_sum"),
        ("engine/norm_method.py", "from clipgrad.rules.registry import Rule"),
        ("compiled/graph.py", "from clipgrad.engine.microbatch import run"),
        ("batch.py", "from clipgrad.compiled import Compiler"),
        ("rules/linear.py", "from .canonical import norm\nfrom clipgrad.rules import registry"),
        ("rules/canonical.py", "import torch\nfrom clipgrad.kernels.selection import select_rows"),
        ("testing.py", "from clipgrad.engine.reference import clipped_sum"),
        ("sampling/_words.py", "torch.rand(3)\nsecrets.token_bytes(8)"),
        ("sampling/_users.py", "from clipgrad.sampling._poisson import PoissonSampler"),
        ("noise/seeded.py", "import torch\ntorch.Generator()\ntorch.empty(3).normal_()"),
        ("noise/keys.py", "secrets.token_bytes(32)"),
        ("noise/cpu.py", "from clipgrad.noise.keys import KeyDeriver"),
        ("function.py", "def f(generator: torch.Generator): vmap(f, randomness='different')"),
        ("accounting/_run.py", "import torchless"),
        ("accounting/_run.py", "from . import _checks\nfrom ._sampling import Poisson"),
        ("accounting/_run.py", "from clipgrad.accounting._checks import rate"),
        ("engine/capture.py", "from clipgrad._phases import phase"),
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
