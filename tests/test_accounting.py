"""Epsilon equals dp-accounting's own, published figures and the closed form; noise meets its target."""

import importlib
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting import pld, rdp
from scipy import optimize, special

from clipgrad import accounting
from clipgrad.accounting import _dp, _equal_steps, _pld, _rdp, _run, epsilon, noise_multiplier
from clipgrad.accounting._equal_steps import EqualSteps
from tests.nightly import every, picked, rows, some, thinned

# The run of Opacus' own tests of its accountants.
OPACUS: dict[str, Any] = {"sample_rate": 0.04, "steps": 2249, "delta": 1e-5}
SHORT: dict[str, Any] = {"sample_rate": 0.01, "steps": 300, "delta": 1e-5}
BOTH = pytest.mark.parametrize("accountant", ["pld", "rdp"])


def own_epsilon(accountant: Any, noise: float, run: dict[str, Any]) -> float:
    step = dp.PoissonSampledDpEvent(run["sample_rate"], dp.GaussianDpEvent(noise))
    return float(
        accountant.compose(dp.SelfComposedDpEvent(step, run["steps"])).get_epsilon(run["delta"])
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", 2018, theorem 8."""

    def excess(eps: float) -> float:
        above = special.ndtr(mu / 2 - eps / mu)
        below = math.exp(eps + special.log_ndtr(-mu / 2 - eps / mu))
        return float(above - below - delta)

    return float(optimize.brentq(excess, 0, 200))


@pytest.mark.parametrize("noise", thinned([0.6, 1.0, 4.0], lambda noise: noise == 1.0))
def test_equals_dp_accounting(noise: float) -> None:
    assert epsilon(noise_multiplier=noise, **SHORT) == own_epsilon(
        pld.PLDAccountant(), noise, SHORT
    )
    ours = epsilon(noise_multiplier=noise, accountant="rdp", **SHORT)
    assert ours == pytest.approx(own_epsilon(rdp.RdpAccountant(), noise, SHORT), rel=1e-12)


def test_equals_published_figures() -> None:
    """Opacus tests/accountants_test.py: its PRV accountant, numerical too, and its RDP accountant.

    PRV estimates, PLD bounds. The two differ by 0.2 %; 1 % more noise would change both by 1.4 %.
    """
    assert epsilon(noise_multiplier=1.5, **OPACUS) == pytest.approx(6.777395712150674, rel=3e-3)
    by_rdp = epsilon(noise_multiplier=1.5, accountant="rdp", **OPACUS)
    assert by_rdp == pytest.approx(7.32911117143, rel=5e-4)


@pytest.mark.parametrize(
    ("noise", "epochs", "published"), rows(2, [(1.3, 15, 1.19), (0.7, 45, 7.10), (1.1, 60, 3.01)])
)
def test_is_no_worse_than_the_mnist_tutorial(noise: float, epochs: int, published: float) -> None:
    """TensorFlow Privacy's table, by RDP of 2019: later bounds are tighter, by less than 30 %."""
    run: dict[str, Any] = {"sample_rate": 256 / 60_000, "steps": epochs * 235, "delta": 1e-5}
    by_rdp = epsilon(noise_multiplier=noise, accountant="rdp", **run)
    assert 0.7 * published < epsilon(noise_multiplier=noise, **run) < by_rdp < published


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
@pytest.mark.parametrize(("noise", "steps"), [(1.5, 1), (3.0, 20)])
def test_equals_the_closed_form_without_sampling(relation: str, noise: float, steps: int) -> None:
    """Noise counts in units of the relation's own sensitivity, so that all relations agree here."""
    exact = gaussian_epsilon(math.sqrt(steps) / noise, 1e-5)
    ours = epsilon(
        noise_multiplier=noise, sample_rate=1.0, steps=steps, delta=1e-5, relation=relation
    )
    assert exact <= ours + 1e-6
    assert ours == pytest.approx(exact, rel=1e-3)


def test_replacing_with_sampling() -> None:
    """Noise of 2 C replaces as dp-accounting's 2 per clip norm; it must cost more than C's 2 do."""
    ours = epsilon(noise_multiplier=1.0, relation="replace_one", **SHORT)
    own = pld.PLDAccountant(dp.NeighboringRelation.REPLACE_ONE)
    assert ours == own_epsilon(own, 2.0, SHORT)
    assert ours > epsilon(noise_multiplier=2.0, **SHORT)


@pytest.mark.parametrize("accountant", every(2, ["rdp", "pld"]))
def test_monotone_in_each_argument(accountant: accounting.Accountant) -> None:
    base = {"noise_multiplier": 1.0, **SHORT}

    def at(**changed: Any) -> float:
        return epsilon(accountant=accountant, **{**base, **changed})

    for name, values in {
        "noise_multiplier": [8.0, 1.0, 0.45, 0.03],  # over both changes of the grid
        "sample_rate": [0.001, 0.1, 1.0],
        "steps": [0, 10, 300, 3000],
        "delta": [0.1, 1e-5, 1e-9],
    }.items():
        results = [at(**{name: value}) for value in values]
        assert results == sorted(results), name
        assert results[0] < results[-1], name


@pytest.mark.parametrize(("noise", "steps", "finer"), rows(2, [(0.3, 1000, 5e-4), (0.1, 10, 1e-3)]))
def test_a_coarser_grid_stays_an_upper_bound(noise: float, steps: int, finer: float) -> None:
    run = {**SHORT, "steps": steps}
    fine = own_epsilon(pld.PLDAccountant(value_discretization_interval=finer), noise, run)
    coarse = epsilon(noise_multiplier=noise, **run)
    assert fine * (1 - 1e-5) <= coarse <= fine * (1 + 1e-3)


@BOTH
@pytest.mark.parametrize("noise", [0.0, 1e-200, 1e-4, 0.002, 0.05, 1e3, 1e9])
@pytest.mark.parametrize("rate", [1e-9, 0.5, 1.0])
def test_extremes(accountant: accounting.Accountant, noise: float, rate: float) -> None:
    """Neither errors nor memory that grows with 1 / noise^2: this took 16 GB at noise 0.3 before."""
    value = epsilon(
        noise_multiplier=noise, sample_rate=rate, steps=10**5, delta=1e-5, accountant=accountant
    )
    assert value >= 0
    assert noise or value == math.inf
    assert noise < 1e9 or value < 1e-3


@BOTH
def test_without_steps_or_noise(accountant: accounting.Accountant) -> None:
    nothing: dict[str, Any] = {**SHORT, "steps": 0, "accountant": accountant}
    assert epsilon(noise_multiplier=0.0, **nothing) == 0.0
    assert noise_multiplier(target_epsilon=1.0, **nothing) == 0.0
    assert epsilon(noise_multiplier=0.0, accountant=accountant, **SHORT) == math.inf
    assert noise_multiplier(target_epsilon=math.inf, accountant=accountant, **SHORT) == 0.0


def test_each_further_step_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a progress bar asks: the divergences of the single step are computed once."""
    made: list[int] = []
    original = rdp.RdpAccountant

    def counting() -> Any:
        made.append(1)
        return original()

    monkeypatch.setattr(rdp, "RdpAccountant", counting)
    values = [
        epsilon(noise_multiplier=1.0625, sample_rate=0.01, steps=s, delta=1e-5, accountant="rdp")
        for s in range(200)
    ]
    assert values == sorted(values)
    assert len(made) == 1


# -------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("accountant", "target"), some(2, ["pld", "rdp"], [0.3, 3.0]))
def test_calibrated_noise_meets_its_target_and_barely(
    accountant: accounting.Accountant, target: float
) -> None:
    run: dict[str, Any] = {**SHORT, "accountant": accountant}
    noise = noise_multiplier(target_epsilon=target, **run)
    assert epsilon(noise_multiplier=noise, **run) <= target
    assert epsilon(noise_multiplier=noise * (1 - 1.1e-4), **run) > target


def test_calibration_equals_dp_accounting() -> None:
    def event(noise: float) -> dp.DpEvent:
        step = dp.PoissonSampledDpEvent(SHORT["sample_rate"], dp.GaussianDpEvent(noise))
        return dp.SelfComposedDpEvent(step, SHORT["steps"])

    theirs = dp.calibrate_dp_mechanism(rdp.RdpAccountant, event, 2.0, SHORT["delta"])
    ours = noise_multiplier(target_epsilon=2.0, accountant="rdp", **SHORT)
    assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.nightly
def test_calibration_for_replacement() -> None:
    run: dict[str, Any] = {**SHORT, "relation": "replace_one"}
    noise = noise_multiplier(target_epsilon=1.0, **run)
    assert 0.999 < epsilon(noise_multiplier=noise, **run) <= 1.0


@pytest.mark.parametrize(
    ("accountant", "target"),
    picked(
        itertools.product(["pld", "rdp"], [1e-6, 1e-4, 1e5]),
        {"pld-0.0001", "rdp-1e-06", "rdp-100000.0"},
    ),
)
def test_calibration_to_extreme_targets(accountant: accounting.Accountant, target: float) -> None:
    run: dict[str, Any] = {**SHORT, "accountant": accountant}
    noise = noise_multiplier(target_epsilon=target, **run)
    assert epsilon(noise_multiplier=noise, **run) <= target


def test_no_noise_is_enough() -> None:
    with pytest.raises(ValueError, match=r"target_epsilon = 1e-300 at delta = 1e-12 is not met"):
        noise_multiplier(
            target_epsilon=1e-300, sample_rate=1.0, steps=10**9, delta=1e-12, accountant="rdp"
        )


def test_a_delta_that_pld_does_not_resolve() -> None:
    """Its curve jumps from infinity far below the target: the noise would be hundreds of times too large."""
    run: dict[str, Any] = {**SHORT, "delta": 1e-16}
    with pytest.raises(
        ValueError, match=r"delta = 1e-16 .* target_epsilon = 3.0 .*accountant='rdp'"
    ):
        noise_multiplier(target_epsilon=3.0, **run)
    assert 0.5 < noise_multiplier(target_epsilon=3.0, accountant="rdp", **run) < 10.0


# ---------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier must be.*got -1.0"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier must be.*got nan"),
        ({"noise_multiplier": math.inf}, ValueError, "noise_multiplier must be.*got inf"),
        ({"noise_multiplier": "1"}, TypeError, "noise_multiplier must be a real number, got '1'"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate must be positive.*got 0.0"),
        ({"sample_rate": 256}, ValueError, "sample_rate.*at most 1, got 256.0.*divided by"),
        ({"steps": -1}, ValueError, "steps must be an integer, at least 0, got -1"),
        ({"steps": 1.5}, ValueError, "steps.*got 1.5"),
        ({"delta": 0.0}, ValueError, "delta must lie between 0 and 1, got 0.0"),
        ({"delta": 1.0}, ValueError, "delta.*got 1.0"),
        (
            {"accountant": "prv"},
            ValueError,
            "accountant must be one of 'pld', 'rdp', 'rdp_integer', got 'prv'",
        ),
        ({"relation": "zero_out"}, ValueError, "relation must be one of.*got 'zero_out'"),
        (
            {"relation": "replace_one", "accountant": "rdp"},
            ValueError,
            "'rdp' cannot treat.*'replace_one'.*use accountant='pld'",
        ),
    ],
)
def test_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        epsilon(**{"noise_multiplier": 1.0, **SHORT, **changed})


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_target_must_be_positive(target: float) -> None:
    with pytest.raises(ValueError, match=f"target_epsilon must be.*got {target}"):
        noise_multiplier(target_epsilon=target, **SHORT)


def test_relations_may_be_members_of_an_enum() -> None:
    class Relation(Enum):  # as clipgrad.Relation
        REPLACE_ONE = "replace_one"

    for relation in (Relation.REPLACE_ONE, dp.NeighboringRelation.REPLACE_ONE):
        assert epsilon(noise_multiplier=1.0, relation=relation, **SHORT) == epsilon(
            noise_multiplier=1.0, relation="replace_one", **SHORT
        )


# ------------------------------------------------------------------------------------ imports


@pytest.fixture
def without_dp_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name.startswith("dp_accounting"):
            raise ModuleNotFoundError("No module named 'dp_accounting'")
        return original(name, package)

    monkeypatch.setattr(_dp, "import_module", import_module)
    for cached in (_equal_steps._epsilon, _rdp._orders, _rdp._of_one_step, _pld._of_one_step):
        cached.cache_clear()


@BOTH
@pytest.mark.usefixtures("without_dp_accounting")
def test_a_missing_package_is_named(accountant: accounting.Accountant) -> None:
    with pytest.raises(ImportError, match=r"pip install 'clipgrad\[accounting\]'"):
        epsilon(noise_multiplier=1.0, accountant=accountant, **SHORT)


def test_importing_needs_neither_torch_nor_dp_accounting() -> None:
    """Loaded from its file, since importing the package brings torch along."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('accounting', {accounting.__file__!r})\n"
        "module = sys.modules['accounting'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'dp_accounting', 'numpy', 'scipy'} & set(sys.modules)\n"
        "print(module.epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=0, delta=0.1))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("0.0\n", "")


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            {"target_epsilon": 3.0, "sample_rate": 256 / 60_000, "steps": 3500, "delta": 1e-5},
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            {"target_epsilon": 8.0, "sample_rate": 0.1, "steps": 300, "delta": 1e-5},
            marks=pytest.mark.nightly,
        ),
        # Here the coarse grid is far off: the secants have to find it.
        pytest.param(
            {"target_epsilon": 1.0, "sample_rate": 0.0005, "steps": 200_000, "delta": 1e-7},
            marks=pytest.mark.nightly,
        ),
        {"target_epsilon": 2.0, "sampling": accounting.FullBatch(), "steps": 10, "delta": 1e-5},
    ],
    ids=["mnist", "large rate", "many steps", "full batches"],
)
def test_the_search_for_noise_needs_few_slow_evaluations(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search also finds the same noise as a search without a coarse grid."""
    evaluated: list[float] = []
    right = EqualSteps.epsilon

    def counting(self: EqualSteps, noise: float) -> float:
        if self.accountant == "pld" and self.coarseness == 1:
            evaluated.append(noise)
        return right(self, noise)

    monkeypatch.setattr(EqualSteps, "epsilon", counting)
    quick = accounting.noise_multiplier(**run)
    assert len(set(evaluated)) <= (9 if run["steps"] > 10_000 else 5)
    monkeypatch.setattr(
        _run,
        "smallest_noise_by_slope",
        lambda a_run, target, start: _run.smallest_noise(a_run, target, start=start, factor=1.25),
    )
    assert quick == pytest.approx(accounting.noise_multiplier(**run), rel=1e-4)
    at = {name: value for name, value in run.items() if name != "target_epsilon"}
    assert accounting.epsilon(noise_multiplier=quick, **at) <= run["target_epsilon"]
    less = accounting.epsilon(noise_multiplier=quick * (1 - 1e-4), **at)
    assert less > run["target_epsilon"]
